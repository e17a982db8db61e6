// Forward KL on one vocabulary shard for CPUs: the same two functions as blocks.py, sixteen logits at a time.
//
// Compiled on first use by native.py with the machine's own C++ compiler, called through ctypes, no PyTorch headers.
// Written with the vector extensions of GCC and Clang, so one source serves AVX2, AVX-512 and NEON.
//
// A row is taken block by block: its maximum, then its sums, while the next block comes from memory. Sums run in
// sixteen FP32 lanes over a block, then in FP64. No value is subtracted from another before its row's maximum so far
// was subtracted from both. Comparisons are written so that NaN is never chosen away: it must reach the result.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 2048;  // of both models, and the next, in a first-level cache of 48 KiB
constexpr int64_t kAhead = 1024;  // the processor's own prefetching stops at each page: without ours, half the speed
constexpr float kFloor = -1e30f;  // what -inf becomes

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline Floats splat(float value) { return Floats{} + value; }

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(bf16* to, Floats value) {  // round to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
  __m256bh halves = _mm512_cvtneps_pbh((__m512)value);  // denormal results become 0
#else
  Words bits = (Words)value;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words is_nan = (Words)(value != value);
  Halves halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

inline Floats at_least(Floats floor, Floats z) {  // the larger; NaN in z stays NaN, in floor it does not count
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)floor, (__m512)z);  // the second operand if either is NaN
#else
  return z < floor ? floor : z;
#endif
}

// The last few columns of a row, filled up with -inf.
template <typename T>
inline Floats load_tail(const T* from, int64_t count) {
  float values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = kFloor;
  for (int64_t lane = 0; lane < count; ++lane) {
    if constexpr (sizeof(T) == 4) {
      values[lane] = from[lane];
    } else {
      uint32_t bits = uint32_t(from[lane].bits) << 16;
      std::memcpy(&values[lane], &bits, 4);
    }
  }
  return load(values);
}

template <typename T>
inline void store_tail(T* to, Floats value, int64_t count) {
  T values[kLanes];
  store(values, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = values[lane];
}

// factor * e^x for x <= 0, within about one unit in the last place; 0 below -87.
// x = n ln 2 + r, |r| <= ln(2) / 2; ln 2 is split so that n times its head is exact.
// The polynomial is a minimax fit of (e^r - 1 - r) / r^2, relative error of e^r 3e-9.
// The choice of 0 comes after the product with `factor`, which keeps the compiler from fusing it with a later
// subtraction: equal student and teacher must give a gradient of exactly 0, not one rounded and one unrounded product.
inline Floats exponential(Floats x, float factor) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest nine bits
  Floats shifted = x * 1.44269504f + magic;
  Floats n = shifted - magic;
  Floats r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  Floats p = splat(0x1.6a23cep-10f);
  p = p * r + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Floats value = (Floats)((Words)p + ((Words)shifted << 23)) * factor;
  return x < -87.0f ? Floats{} : value;
}

// (max(z, floor) - peak) / T
template <bool kTempered>
inline Floats shift(Floats z, float peak, float inverse_temperature) {
  Floats d = at_least(splat(kFloor), z) - peak;
  return kTempered ? d * inverse_temperature : d;
}

inline double sum(Floats lanes) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// The largest of `peak` and a row; NaN does not count.
template <typename T>
float peak_of(const T* row, int64_t columns, float peak) {
  Floats best = splat(kFloor);
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) best = at_least(load(row + column), best);
  best = at_least(load_tail(row + column, columns - column), best);
  for (int lane = 0; lane < kLanes; ++lane) peak = best[lane] > peak ? best[lane] : peak;
  return peak;
}

struct Sums {
  Floats student{}, teacher{}, cross{};

  template <bool kTempered, bool kTeacher>
  inline void add(Floats z_s, Floats z_t, float peak_s, float peak_t, float inverse_temperature) {
    Floats d_s = shift<kTempered>(z_s, peak_s, inverse_temperature);
    student += exponential(d_s, 1.0f);
    if constexpr (kTeacher) {
      Floats d_t = shift<kTempered>(z_t, peak_t, inverse_temperature);
      Floats e_t = exponential(d_t, 1.0f);
      teacher += e_t;
      cross += e_t * (d_t - d_s);
    }
  }
};

// Statistics of the columns seen so far, relative to maxima that may still rise.
struct Totals {
  float peak_s = kFloor, peak_t = kFloor;
  double student = 0, teacher = 0, cross = 0;

  void raise(float to_s, float to_t, double inverse_temperature) {  // as kl.merge puts shards together
    if (to_s == peak_s && to_t == peak_t) return;
    const double drop_s = (double(peak_s) - to_s) * inverse_temperature;
    const double drop_t = (double(peak_t) - to_t) * inverse_temperature;
    cross = std::exp(drop_t) * (cross + teacher * (drop_t - drop_s));
    student *= std::exp(drop_s);
    teacher *= std::exp(drop_t);
    peak_s = to_s;
    peak_t = to_t;
  }

  void add(const Sums& sums) {
    student += sum(sums.student);
    teacher += sum(sums.teacher);
    cross += sum(sums.cross);
  }
};

// One row's m_s, S_s, and with a teacher m_t, S_t, C; `out` advances by `stride` between them.
template <typename S, typename T, bool kTempered, bool kTeacher>
void row_statistics(const S* student, const T* teacher, int64_t columns, float inverse_temperature, double* out,
                    int64_t stride) {
  Totals totals;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = first + kBlock < columns ? first + kBlock : columns;
    const float peak_s = peak_of(student + first, last - first, totals.peak_s);
    const float peak_t = kTeacher ? peak_of(teacher + first, last - first, totals.peak_t) : kFloor;
    totals.raise(peak_s, peak_t, inverse_temperature);
    Sums sums;
    int64_t column = first;
    for (; column + kLanes <= last; column += kLanes) {
      __builtin_prefetch(student + column + kBlock);  // what the next block begins with
      if constexpr (kTeacher) __builtin_prefetch(teacher + column + kBlock);
      sums.add<kTempered, kTeacher>(load(student + column), kTeacher ? load(teacher + column) : Floats{}, peak_s,
                                    peak_t, inverse_temperature);
    }
    if (column < last)
      sums.add<kTempered, kTeacher>(load_tail(student + column, last - column),
                                    kTeacher ? load_tail(teacher + column, last - column) : Floats{}, peak_s, peak_t,
                                    inverse_temperature);
    totals.add(sums);
  }
  out[0] = totals.peak_s;
  out[stride] = totals.student;
  if constexpr (kTeacher) {
    out[2 * stride] = totals.peak_t;
    out[3 * stride] = totals.teacher;
    out[4 * stride] = totals.cross;
  }
}

// One row of f_s e^(d_s) - f_t e^(d_t), from left to right: `out` may be `student`, or BF16 from the first byte of
// either.
template <typename S, typename T, typename O, bool kTempered, bool kTeacher>
void row_gradient(const S* student, const T* teacher, int64_t columns, float inverse_temperature, float peak_s,
                  float peak_t, float factor_s, float factor_t, O* out) {
  auto slope = [&](Floats z_s, Floats z_t) {
    Floats value = exponential(shift<kTempered>(z_s, peak_s, inverse_temperature), factor_s);
    if constexpr (kTeacher) value -= exponential(shift<kTempered>(z_t, peak_t, inverse_temperature), factor_t);
    return value;
  };
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    __builtin_prefetch(student + column + kAhead);
    if constexpr (kTeacher) __builtin_prefetch(teacher + column + kAhead);
    store(out + column, slope(load(student + column), kTeacher ? load(teacher + column) : Floats{}));
  }
  const int64_t rest = columns - column;
  if (rest) {
    Floats z_t = kTeacher ? load_tail(teacher + column, rest) : Floats{};
    store_tail(out + column, slope(load_tail(student + column, rest), z_t), rest);
  }
}

struct Shape {
  int64_t rows, columns, student_stride, teacher_stride, out_stride;
  float inverse_temperature;
  int threads;
};

template <typename S, typename T, bool kTempered, bool kTeacher>
void all_statistics(const void* student, const void* teacher, const uint8_t* mask, double* out, const Shape& shape) {
#pragma omp parallel for schedule(guided) num_threads(shape.threads)
  for (int64_t row = 0; row < shape.rows; ++row) {
    if (mask && !mask[row]) continue;
    row_statistics<S, T, kTempered, kTeacher>((const S*)student + row * shape.student_stride,
                                              (const T*)teacher + row * shape.teacher_stride, shape.columns,
                                              shape.inverse_temperature, out + row, shape.rows);
  }
}

template <typename S, typename T, typename O, bool kTempered, bool kTeacher>
void all_gradients(const void* student, const void* teacher, const float* peaks, const float* factors, void* out,
                   const Shape& shape) {
#pragma omp parallel for schedule(guided) num_threads(shape.threads)
  for (int64_t row = 0; row < shape.rows; ++row) {
    float factor_s = factors[row], factor_t = kTeacher ? factors[shape.rows + row] : 0.0f;
    O* to = (O*)out + row * shape.out_stride;
    if (factor_s == 0.0f && factor_t == 0.0f) {  // not read: it may hold NaN
      std::memset((void*)to, 0, sizeof(O) * shape.columns);
      continue;
    }
    row_gradient<S, T, O, kTempered, kTeacher>((const S*)student + row * shape.student_stride,
                                               (const T*)teacher + row * shape.teacher_stride, shape.columns,
                                               shape.inverse_temperature, peaks[row],
                                               kTeacher ? peaks[shape.rows + row] : 0.0f, factor_s, factor_t, to);
  }
}

enum Type { kAbsent = -1, kFloat32 = 0, kBfloat16 = 1 };

// Calls action.template run<S, T, tempered, teacher>() for run-time types.
template <typename Action>
void dispatch(int student_type, int teacher_type, bool tempered, const Action& action) {
  const bool teacher = teacher_type != kAbsent;
  auto with_types = [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    if (teacher) {
      tempered ? action.template run<S, T, true, true>() : action.template run<S, T, false, true>();
    } else {
      tempered ? action.template run<S, T, true, false>() : action.template run<S, T, false, false>();
    }
  };
  if (student_type == kBfloat16) {
    teacher_type == kBfloat16 ? with_types(bf16{}, bf16{}) : with_types(bf16{}, float{});
  } else {
    teacher_type == kBfloat16 ? with_types(float{}, bf16{}) : with_types(float{}, float{});
  }
}

struct StatisticsCall {
  const void *student, *teacher;
  const uint8_t* mask;
  double* out;
  const Shape& shape;
  template <typename S, typename T, bool kTempered, bool kTeacher>
  void run() const {
    all_statistics<S, T, kTempered, kTeacher>(student, teacher, mask, out, shape);
  }
};

struct GradientCall {
  const void *student, *teacher;
  const float *peaks, *factors;
  void* out;
  bool narrow;
  const Shape& shape;
  template <typename S, typename T, bool kTempered, bool kTeacher>
  void run() const {
    narrow ? all_gradients<S, T, bf16, kTempered, kTeacher>(student, teacher, peaks, factors, out, shape)
           : all_gradients<S, T, S, kTempered, kTeacher>(student, teacher, peaks, factors, out, shape);
  }
};

}  // namespace

extern "C" {

// Types as in `Type`. Without a teacher: only m_s and S_s, and a gradient of f_s e^(d_s). mask may be null: all rows.
// (An empty shard's pointers are null too, so a null teacher does not mean that there is none.)
void megaqad_kl_statistics(const void* student, const void* teacher, int student_type, int teacher_type,
                           const uint8_t* mask, double* out, const Shape* shape) {
  dispatch(student_type, teacher_type, shape->inverse_temperature != 1.0f,
           StatisticsCall{student, teacher, mask, out, *shape});
}

// out has the student's type, or is BF16; what it may share memory with: see row_gradient.
void megaqad_kl_gradient(const void* student, const void* teacher, int student_type, int teacher_type,
                         const float* peaks, const float* factors, void* out, int out_type, const Shape* shape) {
  dispatch(student_type, teacher_type, shape->inverse_temperature != 1.0f,
           GradientCall{student, teacher, peaks, factors, out, out_type == kBfloat16, *shape});
}
}
