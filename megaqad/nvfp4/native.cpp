// NVFP4 for CPUs: the reference's bits from one pass over memory, one block of sixteen elements in one vector.
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

#include <cstdint>
#include <cstring>

namespace {

constexpr int kBlock = 16;  // elements in a block, lanes in a vector, and blocks whose scales are computed together

typedef float Floats __attribute__((vector_size(4 * kBlock)));
typedef uint32_t Words __attribute__((vector_size(4 * kBlock)));
typedef uint16_t Halves __attribute__((vector_size(2 * kBlock)));
typedef uint8_t Bytes __attribute__((vector_size(kBlock)));
typedef uint32_t WordPairs __attribute__((vector_size(2 * kBlock)));  // eight: a pair of elements each
typedef uint16_t HalfPairs __attribute__((vector_size(kBlock)));
typedef uint8_t BytePairs __attribute__((vector_size(kBlock / 2)));

constexpr uint32_t kSign = 0x80000000, kExponent = 0x7f800000, kQuietNan = 0x7fc00000;

inline Floats splat(float value) { return Floats{} + value; }

inline Halves narrow(Words words) { return __builtin_convertvector(words, Halves); }
inline Words widen(Halves halves) { return __builtin_convertvector(halves, Words); }

// By steps of two: GCC moves lane by lane what it shall convert by more.
inline Bytes narrow_to_bytes(Words words) { return __builtin_convertvector(narrow(words), Bytes); }
inline Words widen_bytes(Bytes bytes) { return widen(__builtin_convertvector(bytes, Halves)); }

// Two codes to a byte, the one of the even element low.
inline BytePairs pack(Words codes) {
  WordPairs pairs = (WordPairs)narrow(codes);
  pairs |= pairs >> 12;
  return __builtin_convertvector(__builtin_convertvector(pairs, HalfPairs), BytePairs);
}

inline Words unpack(BytePairs bytes) {
  WordPairs pairs = __builtin_convertvector(__builtin_convertvector(bytes, HalfPairs), WordPairs);
  return widen((Halves)((pairs | (pairs << 12)) & 0x000f000f));
}

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
    Words power = (Words)a & kExponent;
    power = power > kLeast ? power : Words{} + kLeast;
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

using E2M1 = Format<1, 0x3f800000>;  // from 2^0
using E4M3 = Format<3, 0x3c800000>;  // from 2^-6
using Half = Format<10, 0x38800000>;  // from 2^-14

// How elements lie in memory. `Bits` hold one; `Row` sixteen; `widen` takes their bits without sign to float32.

struct Float32 {
  using Bits = uint32_t;
  static constexpr Bits kMagnitude = 0x7fffffff;
  static inline Floats widen(Words magnitudes) { return (Floats)magnitudes; }
  static inline Floats load(const Bits* from) { return load_bits<Floats>(from); }
  static inline void store(Bits* to, Floats value) { store_bits(to, value); }
};

struct Bfloat16 {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff;
  static inline Floats widen(Words magnitudes) { return (Floats)(magnitudes << 16); }
  static inline Floats load(const Bits* from) {
    return (Floats)(::widen(load_bits<Halves>(from)) << 16);
  }
  static inline void store(Bits* to, Floats value) {
    Words bits = (Words)value;  // kQuietNan, of either sign, comes out as NaN; others might not
    store_bits(to, narrow((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr Bits kMagnitude = 0x7fff;
  static inline Floats widen(Words magnitudes) {
    Words special = (magnitudes << Half::kShift) | kExponent;  // infinity and NaN
    return magnitudes < 0x7c00 ? Half::decode(magnitudes) : (Floats)special;
  }
  static inline Floats load(const Bits* from) {
    Words bits = ::widen(load_bits<Halves>(from));
    return (Floats)((Words)widen(bits & kMagnitude) | ((bits & 0x8000) << 16));
  }
  static inline void store(Bits* to, Floats value) {
    Floats a = (Floats)((Words)value & ~kSign);
    Words code = Half::round(a < 65536.0f ? a : splat(65536.0f)).code;  // that is infinity's code
    code = value == value ? code : Words{} + 0x7e00;
    store_bits(to, narrow(code | (((Words)value & kSign) >> 16)));
  }
};

// Bits of a block's largest magnitude: those of non-negative floats order as the floats do, NaN above infinity.
template <typename T>
inline uint32_t largest(const typename T::Bits* block) {
  typename T::Bits best = 0;
  for (int lane = 0; lane < kBlock; ++lane) {
    typename T::Bits magnitude = block[lane] & T::kMagnitude;
    best = magnitude > best ? magnitude : best;
  }
  return best;
}

// E4M3 scales of blocks with these amax, which should become 6; 1 for zero. `code` has 0x7f for NaN.
inline E4M3::Rounded block_scales(Floats amax, float global_scale) {
  Floats ideal = amax / (6.0f * global_scale);
  ideal = ideal == 0.0f ? splat(1.0f) : ideal;
  ideal = ideal < 0x1p-9f ? splat(0x1p-9f) : ideal;
  ideal = ideal > 448.0f ? splat(448.0f) : ideal;
  E4M3::Rounded rounded = E4M3::round(ideal);
  rounded.code = ideal == ideal ? rounded.code : Words{} + 0x7f;
  return rounded;
}

// What a block's elements are multiples of; of NaN one only, so that elements need not be asked.
inline Floats steps_of(Floats scales, float global_scale) {
  Floats steps = scales * global_scale;
  return steps == steps ? steps : (Floats)(Words{} + kQuietNan);
}

// One block in units of its scale, to values and codes; either may be null.
template <typename T>
inline void quantize_block(const typename T::Bits* x, float scale, typename T::Bits* values, uint8_t* codes) {
  Words bits = (Words)T::load(x);
  Words sign = bits & kSign;
  Floats units = (Floats)(bits & ~kSign) / scale;
  E2M1::Rounded rounded = E2M1::round(units < 6.0f ? units : splat(6.0f));  // NaN too
  if (values) T::store(values, (Floats)((Words)rounded.value | sign) * scale + 0.0f);  // + 0: no minus zero
  if (codes) {
    store_bits(codes, pack(rounded.code | ((Words)(units > 0.0f) & (sign >> 28))));
  }
}

// Where tensors begin; of `values`, `codes` with `scales`, and `chosen`, those not wanted are null.
struct Tensors {
  const void* x;             // [blocks, 16]
  const float* global_scale; // [rows]
  const float* chosen;       // [blocks]: amax that stand in for the blocks' own
  void* values;              // [blocks, 16]
  uint8_t* codes;            // [blocks, 8]
  uint8_t* scales;           // [blocks]
};

struct Shape {
  int64_t rows, blocks_per_row;  // a row is what shares a global scale
  int type, threads;
};

// Up to sixteen blocks of one row.
template <typename T, bool kValues, bool kCodes>
inline void quantize_group(const Tensors& t, int64_t first, int count, float global_scale) {
  const auto* x = (const typename T::Bits*)t.x + first * kBlock;
  Floats amax{};
  if (t.chosen) {
    std::memcpy(&amax, t.chosen + first, sizeof(float) * count);
  } else {
    uint32_t tops[kBlock] = {};
    for (int block = 0; block < count; ++block) tops[block] = largest<T>(x + block * kBlock);
    amax = T::widen(load_bits<Words>(tops));
  }
  E4M3::Rounded rounded = block_scales(amax, global_scale);
  float steps[kBlock];
  store_bits(steps, steps_of(rounded.value, global_scale));
  for (int block = 0; block < count; ++block)
    quantize_block<T>(x + block * kBlock, steps[block],
                      kValues ? (typename T::Bits*)t.values + (first + block) * kBlock : nullptr,
                      kCodes ? t.codes + (first + block) * (kBlock / 2) : nullptr);
  if (kCodes) {
    Bytes bytes = narrow_to_bytes(rounded.code);
    std::memcpy(t.scales + first, &bytes, count);
  }
}

// Calls action(first block, number of blocks, row) for every group of up to sixteen blocks of a row.
template <typename Action>
inline void for_each_group(const Shape& shape, const Action& action) {
  const int64_t groups = (shape.blocks_per_row + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(shape.threads)
  for (int64_t group = 0; group < shape.rows * groups; ++group) {
    int64_t row = group / groups, block = group % groups * kBlock, rest = shape.blocks_per_row - block;
    action(row * shape.blocks_per_row + block, rest < kBlock ? int(rest) : kBlock, row);
  }
}

template <typename T>
void quantize(const Tensors& t, const Shape& shape) {
  auto run = [&](auto group) {
    for_each_group(shape, [&](int64_t first, int count, int64_t row) { group(first, count, t.global_scale[row]); });
  };
  if (!t.codes)
    run([&](auto... arguments) { quantize_group<T, true, false>(t, arguments...); });
  else if (!t.values)
    run([&](auto... arguments) { quantize_group<T, false, true>(t, arguments...); });
  else
    run([&](auto... arguments) { quantize_group<T, true, true>(t, arguments...); });
}

template <typename T>
void dequantize(const Tensors& t, const Shape& shape) {
  for_each_group(shape, [&](int64_t first, int count, int64_t row) {
    uint8_t bytes[kBlock] = {};
    std::memcpy(bytes, t.scales + first, count);
    Words code = widen_bytes(load_bits<Bytes>(bytes));
    Words magnitude = code & 0x7f;
    Words scale = (Words)E4M3::decode(magnitude) | ((code & 0x80) << 24);
    scale = magnitude == 0x7f ? Words{} + kQuietNan : scale;
    float steps[kBlock];
    store_bits(steps, steps_of((Floats)scale, t.global_scale[row]));
    for (int block = 0; block < count; ++block) {
      Words codes = unpack(load_bits<BytePairs>(t.codes + (first + block) * (kBlock / 2)));
      Words sign = (codes & 8) << 28;
      Floats value = (Floats)((Words)E2M1::decode(codes & 7) | sign) + 0.0f;
      T::store((typename T::Bits*)t.values + (first + block) * kBlock, value * steps[block]);
    }
  });
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

void megaqad_nvfp4_quantize(const Tensors* tensors, const Shape* shape) {
  with_type(shape->type, [&](auto type) { quantize<decltype(type)>(*tensors, *shape); });
}

// From codes, scales and global scale to values.
void megaqad_nvfp4_dequantize(const Tensors* tensors, const Shape* shape) {
  with_type(shape->type, [&](auto type) { dequantize<decltype(type)>(*tensors, *shape); });
}
}
