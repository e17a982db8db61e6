// NVFP4 for CPUs: the reference's bits from one pass over memory.
//
// Compiled on first use by native.py, called through ctypes, no PyTorch headers. Written with the vector extensions of
// GCC and Clang, so one source serves AVX2, AVX-512 and NEON; little-endian machines only, as checkpoints are.
//
// Bit equality rests on IEEE 754: every product, quotient and sum is rounded once to float32, which -ffp-contract=off
// guarantees, and no flag lets the compiler reorder. Rounding to the formats below float32 is arithmetic too:
//
// Adding a number so large that its last mantissa bit is worth u rounds to a multiple of u, to nearest, ties to even;
// subtracting it again leaves the rounded value. Where u is the last place of a value in a smaller format, set by the
// power of two at or below the value, the bits that the addition left are the value's code in that format.
//
// Work goes by groups of sixteen blocks, whose scales are computed together, and in them by pairs of vectors: of twice as
// many elements as a vector has lanes, one takes those with an even index, the other those with an odd one. Then the two
// codes of a byte, and two elements of sixteen bits, stand in the same lane, and nothing has to change lanes to be packed.

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBlock = 16;                // elements
constexpr int kBlocks = 16;               // of a group
constexpr int kGroup = kBlocks * kBlock;  // elements

// As many lanes as a register has: GCC takes wider vectors apart, some operations lane by lane.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#define MEGAQAD_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define MEGAQAD_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define MEGAQAD_FIRST_HALF 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define MEGAQAD_SECOND_HALF 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#define MEGAQAD_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define MEGAQAD_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define MEGAQAD_FIRST_HALF 0, 8, 1, 9, 2, 10, 3, 11
#define MEGAQAD_SECOND_HALF 4, 12, 5, 13, 6, 14, 7, 15
#else
constexpr int kLanes = 4;
#define MEGAQAD_EVENS 0, 2, 4, 6
#define MEGAQAD_ODDS 1, 3, 5, 7
#define MEGAQAD_FIRST_HALF 0, 4, 1, 5
#define MEGAQAD_SECOND_HALF 2, 6, 3, 7
#endif

constexpr int kStride = 2 * kLanes;          // elements of a pair of vectors
constexpr int kPairs = kGroup / kStride;     // of a group
constexpr int kVectors = kBlocks / kLanes;   // of numbers that a group has one of per block

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr uint32_t kSign = 0x80000000, kExponent = 0x7f800000, kQuietNan = 0x7fc00000;

inline Floats splat(float value) { return value - Floats{}; }  // + would turn -0 into 0
inline Words splat(uint32_t value) { return Words{} + value; }

template <typename Vector>
inline Vector load_bits(const void* from) {
  Vector bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

template <typename Vector>
inline void store_bits(void* to, Vector bits) {
  std::memcpy(to, &bits, sizeof bits);
}

#if defined(__clang__)
#define MEGAQAD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MEGAQAD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Of the words of a and b, one behind the other: those with an even index, those with an odd one; and back.
inline Words evens(Words a, Words b) { return MEGAQAD_SHUFFLE(a, b, MEGAQAD_EVENS); }
inline Words odds(Words a, Words b) { return MEGAQAD_SHUFFLE(a, b, MEGAQAD_ODDS); }
inline Words first_half(Words even, Words odd) { return MEGAQAD_SHUFFLE(even, odd, MEGAQAD_FIRST_HALF); }
inline Words second_half(Words even, Words odd) { return MEGAQAD_SHUFFLE(even, odd, MEGAQAD_SECOND_HALF); }

// By steps of two: GCC moves lane by lane what it shall convert by more.
inline Bytes narrow(Words words) { return __builtin_convertvector(__builtin_convertvector(words, Halves), Bytes); }
inline Words widen(Bytes bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, Halves), Words); }

inline Words larger(Words a, Words b) { return a > b ? a : b; }

// A format of kMantissa explicit mantissa bits whose least normal number has the float32 bits kLeast.
template <int kMantissa, uint32_t kLeast>
struct Format {
  static constexpr int kShift = 23 - kMantissa;

  struct Rounded {
    Floats value;
    Words code;
  };

  // Of non-negative numbers, ties to even. Beyond the format's range it goes on as if the exponent had more bits; of NaN
  // the value is NaN and the code nothing.
  static inline Rounded round(Floats a) {
    Words power = larger((Words)a & kExponent, splat(kLeast));
    Words large = power + (uint32_t(kShift) << 23);
    Floats total = a + (Floats)large;
    return {total - (Floats)large, (Words)total - large + ((power - kLeast) >> kShift)};
  }

  // The value of a code without sign.
  static inline Floats decode(Words code) {
    Words subnormal = (Words)(code < (1u << kMantissa));  // all ones or zero
    Words bits = (code << kShift) + kLeast - (~subnormal & 0x00800000);
    return (Floats)bits - (Floats)(subnormal & kLeast);
  }
};

using E2M1 = Format<1, 0x3f800000>;   // from 2^0
using E4M3 = Format<3, 0x3c800000>;   // from 2^-6
using Half = Format<10, 0x38800000>;  // from 2^-14

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

// Largest magnitude of each block of a group. Bits of non-negative floats order as the floats do, NaN above infinity.
template <typename T>
inline void largest(const typename T::Bits* x, float* of_blocks) {
  Words best[kPairs];
  for (int pair = 0; pair < kPairs; ++pair) {
    Pair values = T::load(x + kStride * pair);
    best[pair] = larger((Words)values.even & ~kSign, (Words)values.odd & ~kSign);
  }
  for (int left = kPairs / 2; left >= kVectors; left /= 2)  // a block has neighbouring lanes, half as many each time
    for (int i = 0; i < left; ++i)
      best[i] = larger(evens(best[2 * i], best[2 * i + 1]), odds(best[2 * i], best[2 * i + 1]));
  for (int i = 0; i < kVectors; ++i) store_bits(of_blocks + kLanes * i, best[i]);
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

  Places at(int64_t block) const {
    return {x ? x + block * kBlock : x, chosen ? chosen + block : chosen, values ? values + block * kBlock : values,
            codes ? codes + block * (kBlock / 2) : codes, scales ? scales + block : scales};
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
  if (at.x) std::memcpy(x, at.x, blocks * kBlock * sizeof x[0]);
  if (at.chosen) std::memcpy(chosen, at.chosen, blocks * sizeof chosen[0]);
  if (at.codes) std::memcpy(codes, at.codes, blocks * (kBlock / 2));
  if (at.scales) std::memcpy(scales, at.scales, blocks);
  work_on<Work>(Places<T>{x, at.chosen ? chosen : nullptr, values, codes, scales}, of_rows, shape, block);
  if (at.values) std::memcpy(at.values, values, blocks * kBlock * sizeof x[0]);
  if (at.codes) std::memcpy(at.codes, codes, blocks * (kBlock / 2));
  if (at.scales) std::memcpy(at.scales, scales, blocks);
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
    Places<T> places{(const Bits*)x, chosen, (Bits*)values, codes, scales};
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
    Places<T> places{nullptr, nullptr, (typename T::Bits*)values, (uint8_t*)codes, (uint8_t*)scales};
    work_on_all<Dequantize<T>>(places, global_scale, *shape);
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
