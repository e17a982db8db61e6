// Number formats below float32 in vectors of float32.
//
// Bit equality rests on IEEE 754: every product, quotient and sum is rounded once to float32, which -ffp-contract=off
// guarantees, and no flag lets the compiler reorder. Rounding to the formats below float32 is arithmetic too:
//
// Adding a number so large that its last mantissa bit is worth u rounds to a multiple of u, to nearest, ties to even;
// subtracting it again leaves the rounded value. Where u is the last place of a value in a smaller format, set by the
// power of two at or below the value, the bits that the addition left are the value's code in that format.

#pragma once

#include "../vectors.h"

namespace {

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

}  // namespace
