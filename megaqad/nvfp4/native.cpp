// NVFP4 for CPUs: the reference's bits from one pass over memory.
//
// Compiled on first use by native.py, called through ctypes, no PyTorch headers; little-endian machines only, as
// checkpoints are. Why the bits are the reference's is in formats.h.
//
// Work goes by groups of sixteen blocks, whose scales are computed together, and in them by pairs of vectors: of twice as
// many elements as a vector has lanes, one takes those with an even index, the other those with an odd one. Then the two
// codes of a byte, and two elements of sixteen bits, stand in the same lane, and nothing has to change lanes to be packed.

#include <cstdint>
#include <cstring>

#include "formats.h"

namespace {

constexpr int kBlock = 16;                  // elements
constexpr int kBlocks = 16;                 // of a group
constexpr int kGroup = kBlocks * kBlock;    // elements
constexpr int kStride = 2 * kLanes;         // elements of a pair of vectors
constexpr int kPairs = kGroup / kStride;    // of a group
constexpr int kVectors = kBlocks / kLanes;  // of numbers that a group has one of per block

// The even and the odd of kStride elements.
struct Pair {
  Floats even, odd;
};

// How elements lie in memory.

struct Float32 {
  using Bits = uint32_t;
  static inline Pair load(const Bits* from) {
    Words a = load_bits<Words>(from), b = load_bits<Words>(from + kLanes);
    return {(Floats)evens(a, b), (Floats)odds(a, b)};
  }
  static inline void store(Bits* to, Pair values) {
    store_bits(to, first_half((Words)values.even, (Words)values.odd));
    store_bits(to + kLanes, second_half((Words)values.even, (Words)values.odd));
  }
};

struct Bfloat16 {
  using Bits = uint16_t;
  static inline Pair load(const Bits* from) {
    Words words = load_bits<Words>(from);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000)};
  }
  static inline Words round(Floats value) {  // kQuietNan, of either sign, stays NaN; others might not
    Words bits = (Words)value;
    return bits + 0x7fff + ((bits >> 16) & 1);
  }
  static inline void store(Bits* to, Pair values) {
    store_bits(to, (round(values.even) >> 16) | (round(values.odd) & 0xffff0000));
  }
};

struct Float16 {
  using Bits = uint16_t;
  static inline Floats decode(Words bits) {
    Words code = bits & 0x7fff, special = (code << Half::kShift) | kExponent;  // infinity and NaN
    Words magnitude = code < 0x7c00 ? (Words)Half::decode(code) : special;
    return (Floats)(magnitude | ((bits & 0x8000) << 16));
  }
  static inline Words encode(Floats value) {
    Floats a = (Floats)((Words)value & ~kSign);
    Words code = Half::round(a < 65536.0f ? a : splat(65536.0f)).code;  // that is infinity's code
    code = value == value ? code : splat(0x7e00u);
    return code | (((Words)value & kSign) >> 16);
  }
  static inline Pair load(const Bits* from) {
    Words words = load_bits<Words>(from);
    return {decode(words & 0xffff), decode(words >> 16)};
  }
  static inline void store(Bits* to, Pair values) {
    store_bits(to, encode(values.even) | (encode(values.odd) << 16));
  }
};

// Combines neighbours with neighbours until each block of a group has one number. `of_pairs` [kPairs], overwritten, is
// what its pairs of vectors were combined to. A block has neighbouring lanes there, half as many each time.
template <typename Combine>
inline void reduce(Words* of_pairs, float* of_blocks, const Combine& combine) {
  for (int left = kPairs / 2; left >= kVectors; left /= 2)
    for (int i = 0; i < left; ++i)
      of_pairs[i] = combine(evens(of_pairs[2 * i], of_pairs[2 * i + 1]), odds(of_pairs[2 * i], of_pairs[2 * i + 1]));
  std::memcpy(of_blocks, of_pairs, sizeof(float) * kBlocks);
}

// Largest magnitude of each block of a group. Bits of non-negative floats order as the floats do, NaN above infinity.
template <typename T>
inline void largest(const typename T::Bits* x, float* of_blocks) {
  Words best[kPairs];
  for (int pair = 0; pair < kPairs; ++pair) {
    Pair values = T::load(x + kStride * pair);
    best[pair] = larger((Words)values.even & ~kSign, (Words)values.odd & ~kSign);
  }
  reduce(best, of_blocks, larger);
}

// E4M3 scales of blocks with these amax, which should become 6; 1 for zero. `code` has 0x7f for NaN.
inline E4M3::Rounded block_scales(Floats amax, Floats global_scale) {
  Floats ideal = amax / (6.0f * global_scale);
  ideal = ideal == 0.0f ? splat(1.0f) : ideal;
  ideal = ideal < 0x1p-9f ? splat(0x1p-9f) : ideal;
  ideal = ideal > 448.0f ? splat(448.0f) : ideal;
  E4M3::Rounded rounded = E4M3::round(ideal);
  rounded.code = ideal == ideal ? rounded.code : splat(0x7fu);
  return rounded;
}

// What elements are multiples of, from the scales of their blocks. There is one NaN only, so that elements need not be
// asked for others.
inline Floats steps_of(Floats scales, Floats global_scales) {
  Floats steps = scales * global_scales;
  return steps == steps ? steps : (Floats)splat(kQuietNan);
}

// From the steps of a group's blocks, those of one pair's lanes.
inline Floats steps_of_pair(const float* of_blocks, int pair) {
  const float* first = of_blocks + pair * kStride / kBlock;
#if defined(__AVX512F__)
  const Words of_second = {0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  return of_second ? splat(first[1]) : splat(first[0]);
#else
  return splat(*first);
#endif
}

struct Quantized {
  Floats value;
  Words code;
};

inline Quantized quantize(Floats x, Floats step) {
  Words sign = (Words)x & kSign;
  Floats units = (Floats)((Words)x & ~kSign) / step;
  E2M1::Rounded rounded = E2M1::round(units < 6.0f ? units : splat(6.0f));  // NaN too
  return {(Floats)((Words)rounded.value | sign) * step + 0.0f,              // + 0: no minus zero
          rounded.code | ((Words)(units > 0.0f) & (sign >> 28))};
}

// Of a group of blocks, or of the whole: where its parts begin. What is not wanted of them is null.
template <typename T>
struct Places {
  const typename T::Bits* x;  // [blocks, 16]
  const float* chosen;        // [blocks]: amax that stand in for the blocks' own
  typename T::Bits* values;   // [blocks, 16]
  uint8_t* codes;             // [blocks, 8]
  uint8_t* scales;            // [blocks]
  float* errors;              // [blocks]

  Places at(int64_t block) const {
    return {x ? x + block * kBlock : x, chosen ? chosen + block : chosen, values ? values + block * kBlock : values,
            codes ? codes + block * (kBlock / 2) : codes, scales ? scales + block : scales,
            errors ? errors + block : errors};
  }
};

template <typename T, bool kValues, bool kCodes>
struct Quantize {
  static void group(const Places<T>& at, const float* global_scales) {
    float amax[kBlocks], steps[kBlocks];
    if (at.chosen)
      std::memcpy(amax, at.chosen, sizeof amax);
    else
      largest<T>(at.x, amax);
    for (int block = 0; block < kBlocks; block += kLanes) {
      Floats global_scale = load_bits<Floats>(global_scales + block);
      E4M3::Rounded scales = block_scales(load_bits<Floats>(amax + block), global_scale);
      store_bits(steps + block, steps_of(scales.value, global_scale));
      if (kCodes) store_bits(at.scales + block, narrow(scales.code));
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      Pair x = T::load(at.x + kStride * pair);
      Floats step = steps_of_pair(steps, pair);
      Quantized even = quantize(x.even, step), odd = quantize(x.odd, step);
      if (kValues) T::store(at.values + kStride * pair, {even.value, odd.value});
      if (kCodes) store_bits(at.codes + kLanes * pair, narrow(even.code | (odd.code << 4)));
    }
  }
};

inline Floats decode_e2m1(Words code) {
  return (Floats)((Words)E2M1::decode(code & 7) | ((code & 8) << 28)) + 0.0f;  // code 8 is plain zero
}

inline Floats decode_e4m3(Words code) {
  Words magnitude = code & 0x7f;
  Words bits = magnitude == 0x7f ? splat(kQuietNan) : (Words)E4M3::decode(magnitude);
  return (Floats)(bits | ((code & 0x80) << 24));
}

template <typename T>
struct Dequantize {
  static void group(const Places<T>& at, const float* global_scales) {
    float steps[kBlocks];
    for (int block = 0; block < kBlocks; block += kLanes) {
      Floats scales = decode_e4m3(widen(load_bits<Bytes>(at.scales + block)));
      store_bits(steps + block, steps_of(scales, load_bits<Floats>(global_scales + block)));
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      Words bytes = widen(load_bits<Bytes>(at.codes + kLanes * pair));
      Floats step = steps_of_pair(steps, pair);
      T::store(at.values + kStride * pair, {decode_e2m1(bytes & 15) * step, decode_e2m1(bytes >> 4) * step});
    }
  }
};

// Squared errors of blocks under given steps, one for each block.
template <typename T>
struct Errors {
  static void group(const Places<T>& at, const float* steps) {
    Words squares[kPairs];  // neighbours first: Python adds them up in this order
    for (int pair = 0; pair < kPairs; ++pair) {
      Pair x = T::load(at.x + kStride * pair);
      Floats step = steps_of_pair(steps, pair);
      Floats even = quantize(x.even, step).value - x.even, odd = quantize(x.odd, step).value - x.odd;
      squares[pair] = (Words)(even * even + odd * odd);
    }
    reduce(squares, at.errors, [](Words a, Words b) { return (Words)((Floats)a + (Floats)b); });
  }
};

struct Shape {
  int64_t rows, blocks_per_row;  // a row is what shares a global scale
  int type, threads;
};

// Does a group's work, from `block` on, with the global scale of each of its blocks; the last row's behind the end.
template <typename Work, typename T>
inline void work_on(const Places<T>& at, const float* of_rows, const Shape& shape, int64_t block) {
  float scales[kBlocks];
  int64_t row = block / shape.blocks_per_row, left = (row + 1) * shape.blocks_per_row - block;
  for (int i = 0; i < kBlocks; ++i, --left) {
    if (left == 0 && row + 1 < shape.rows) ++row, left = shape.blocks_per_row;
    scales[i] = of_rows[row];
  }
  Work::group(at, scales);
}

// The last group, of fewer blocks than others, in room for all.
template <typename Work, typename T>
void work_on_rest(const Places<T>& at, const float* of_rows, const Shape& shape, int64_t block) {
  const size_t blocks = size_t(shape.rows * shape.blocks_per_row - block);
  typename T::Bits x[kGroup] = {}, values[kGroup];
  float chosen[kBlocks] = {};
  uint8_t codes[kGroup / 2] = {}, scales[kBlocks] = {};
  float errors[kBlocks];
  if (at.x) std::memcpy(x, at.x, blocks * kBlock * sizeof x[0]);
  if (at.chosen) std::memcpy(chosen, at.chosen, blocks * sizeof chosen[0]);
  if (at.codes) std::memcpy(codes, at.codes, blocks * (kBlock / 2));
  if (at.scales) std::memcpy(scales, at.scales, blocks);
  work_on<Work>(Places<T>{x, at.chosen ? chosen : nullptr, values, codes, scales, errors}, of_rows, shape, block);
  if (at.values) std::memcpy(at.values, values, blocks * kBlock * sizeof x[0]);
  if (at.codes) std::memcpy(at.codes, codes, blocks * (kBlock / 2));
  if (at.scales) std::memcpy(at.scales, scales, blocks);
  if (at.errors) std::memcpy(at.errors, errors, blocks * sizeof errors[0]);
}

template <typename Work, typename T>
void work_on_all(const Places<T>& places, const float* of_rows, const Shape& shape) {
  const int64_t blocks = shape.rows * shape.blocks_per_row, full = blocks / kBlocks * kBlocks;
#pragma omp parallel for schedule(static) num_threads(shape.threads)
  for (int64_t block = 0; block < full; block += kBlocks) work_on<Work>(places.at(block), of_rows, shape, block);
  if (full < blocks) work_on_rest<Work>(places.at(full), of_rows, shape, full);
}

// Bits of the largest magnitude of each row, without sign; see `largest`.
template <typename Bits>
void row_maxima(const Bits* x, Bits* out, int64_t rows, int64_t columns, int threads) {
  constexpr Bits kMagnitude = Bits(-1) >> 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    Bits best = 0;
    for (int64_t column = 0; column < columns; ++column) {
      Bits magnitude = x[row * columns + column] & kMagnitude;
      best = magnitude > best ? magnitude : best;
    }
    out[row] = best;
  }
}

// Calls action with the type of the elements.
template <typename Action>
void with_type(int type, const Action& action) {
  if (type == 0) action(Float32{});
  if (type == 1) action(Bfloat16{});
  if (type == 2) action(Float16{});
}

}  // namespace

extern "C" {

// x and global_scale [rows] to values, or to codes and scales, or to all; `chosen` may be null.
void megaqad_nvfp4_quantize(const void* x, const float* global_scale, const float* chosen, void* values, uint8_t* codes,
                            uint8_t* scales, const Shape* shape) {
  with_type(shape->type, [&](auto type) {
    using T = decltype(type);
    using Bits = typename T::Bits;
    Places<T> places{(const Bits*)x, chosen, (Bits*)values, codes, scales, nullptr};
    if (!codes)
      work_on_all<Quantize<T, true, false>>(places, global_scale, *shape);
    else if (!values)
      work_on_all<Quantize<T, false, true>>(places, global_scale, *shape);
    else
      work_on_all<Quantize<T, true, true>>(places, global_scale, *shape);
  });
}

void megaqad_nvfp4_dequantize(const uint8_t* codes, const uint8_t* scales, const float* global_scale, void* values,
                              const Shape* shape) {
  with_type(shape->type, [&](auto type) {
    using T = decltype(type);
    Places<T> places{nullptr, nullptr, (typename T::Bits*)values, (uint8_t*)codes, (uint8_t*)scales, nullptr};
    work_on_all<Dequantize<T>>(places, global_scale, *shape);
  });
}

// Of blocks that are rows of their own: steps, in place of global scales, to errors.
void megaqad_nvfp4_squared_errors(const void* x, const float* steps, float* errors, const Shape* shape) {
  with_type(shape->type, [&](auto type) {
    using T = decltype(type);
    Places<T> places{(const typename T::Bits*)x, nullptr, nullptr, nullptr, nullptr, errors};
    work_on_all<Errors<T>>(places, steps, *shape);
  });
}

// x [rows, columns] to out [rows] of the same type.
void megaqad_nvfp4_row_amax(const void* x, void* out, int type, int64_t rows, int64_t columns, int threads) {
  with_type(type, [&](auto element) {
    using Bits = typename decltype(element)::Bits;
    row_maxima((const Bits*)x, (Bits*)out, rows, columns, threads);
  });
}
}
