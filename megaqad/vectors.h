// Vectors of the machine's width.
//
// Written with the vector extensions of GCC and Clang, so one source serves AVX2, AVX-512 and NEON.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

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

}  // namespace
