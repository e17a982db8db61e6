"""The number formats inside Triton kernels: elements to float32 and back, rounding to E4M3 and E2M1, division.

Everything is float32 and integer arithmetic that IEEE 754 pins down, the same bits on any device and in Triton's
interpreter:

Division is correctly rounded, which Triton's ``/`` is not. ``div_rn`` is, at a dozen instructions, as many as all the
rest of an element's work. ``divide`` needs five: from a correctly rounded reciprocal ``r`` of the divisor, shared by
the block, one fused multiply-add pair makes ``a * r`` faithful, and a second one makes it correctly rounded (Markstein,
IBM J. Res. Dev. 34, 1990). It holds while the remainders are representable, which below a global scale of 2**-90 they
may not be; a tensor that small takes ``div_rn``, and so does the interpreter, whose ``fma`` rounds twice.

Rounding to E2M1 and E4M3 is by adding and subtracting a large power of two; see ``vectorized``. Casts to FP8 would be
right when compiled and wrong in the interpreter, as those to BF16 are: there that one is spelled out on the bits.
"""

# ruff: noqa: PLR0124, RET505 - functions ask for NaN by x == x, and choose at compile time by if and else
import triton
import triton.language as tl

_EXPONENT = tl.constexpr(0x7F800000)
_ONE_BITS = tl.constexpr(0x3F800000)
_MIN_NORMAL_E4M3 = tl.constexpr(2.0**-6)
_MIN_NORMAL_E4M3_BITS = tl.constexpr(0x3C800000)
_MIN_E4M3 = tl.constexpr(2.0**-9)


@triton.jit
def split_word(word: tl.tensor, FORMAT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The even and the odd element of a word, as float32."""
    if FORMAT == "bf16":  # the upper half of a float32
        return (word << 16).to(tl.float32, bitcast=True), ((word >> 16) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        even = word.to(tl.int16).to(tl.float16, bitcast=True)
        odd = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return even.to(tl.float32), odd.to(tl.float32)
    else:
        even, odd = word.to(tl.int32), (word >> 32).to(tl.int32)
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)


@triton.jit
def join_word(even: tl.tensor, odd: tl.tensor, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The word of two float32, each rounded to the format."""
    if FORMAT == "fp32":
        low, high = even.to(tl.int32, bitcast=True).to(tl.int64), odd.to(tl.int32, bitcast=True).to(tl.int64)
        return (high << 32) | (low & 0xFFFFFFFF)
    elif INTERPRETED and FORMAT == "bf16":
        return (_bf16_bits(odd) << 16) | _bf16_bits(even)
    elif INTERPRETED:
        low, high = even.to(tl.float16).to(tl.int16, bitcast=True), odd.to(tl.float16).to(tl.int16, bitcast=True)
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    elif FORMAT == "bf16":  # one instruction for both, where two casts and a merge take four
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", [odd, even], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,r,r", [odd, even], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _bf16_bits(v: tl.tensor) -> tl.tensor:
    """BF16 bits of a float32, in the low half of an int32: add just under half a step, more if that makes it even."""
    bits = v.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(v == v, rounded, 0x7FC0)


@triton.jit
def magnitude_bits(v: tl.tensor) -> tl.tensor:
    """Bits of ``abs(v)``: non-negative floats order as these integers do, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divide(a: tl.tensor, b: tl.tensor, r: tl.tensor) -> tl.tensor:
    """``a / b`` correctly rounded, for ``r`` the correctly rounded ``1 / b``; NaN where it overflows."""
    faithful = a * r
    faithful = tl.fma(tl.fma(-b, faithful, a), r, faithful)
    return tl.fma(tl.fma(-b, faithful, a), r, faithful)


@triton.jit
def round_to_e4m3(s: tl.tensor) -> tl.tensor:
    """Round float32 in 2**-9..448 to the values of E4M3, ties to even; NaN stays NaN."""
    power = tl.maximum(s.to(tl.int32, bitcast=True) & _EXPONENT, _MIN_NORMAL_E4M3_BITS)
    rounder = (power + (20 << 23)).to(tl.float32, bitcast=True)
    return (s + rounder) - rounder


@triton.jit
def e4m3_byte(v: tl.tensor) -> tl.tensor:
    """The byte, in an int32, of a value of E4M3."""
    normal = (v.to(tl.int32, bitcast=True) >> 20) - 960  # keep three mantissa bits, move the exponent's bias to 7
    byte = tl.where(v < _MIN_NORMAL_E4M3, (v * 512).to(tl.int32), normal)
    return tl.where(v == v, byte, 0x7F)


@triton.jit
def e4m3_value(byte: tl.tensor) -> tl.tensor:
    """float32 of an E4M3 byte held in an int32."""
    magnitude = byte & 0x7F
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * _MIN_E4M3, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@triton.jit
def round_to_e2m1(y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Magnitude and code 0..7 of a non-negative float32, ties to even; beyond 6, and for NaN, 6 and 7."""
    y = tl.where(y < 6.0, y, 6.0)
    power = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT, _ONE_BITS)  # of 1, 2 or 4
    rounder = power + (22 << 23)  # 2**22 times that: its last place is worth half of it
    total = y + rounder.to(tl.float32, bitcast=True)
    magnitude = total - rounder.to(tl.float32, bitcast=True)
    code = (total.to(tl.int32, bitcast=True) - rounder) + ((power - _ONE_BITS) >> 22)
    return magnitude, code


@triton.jit
def with_sign(magnitude: tl.tensor, x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """``magnitude * scale`` with the sign of ``x``, zeros positive: adding +0.0 turns -0.0 into it and no other bit."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    signed = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.fma(signed, tl.broadcast_to(scale, signed.shape), tl.zeros(signed.shape, tl.float32))


@triton.jit
def e2m1_value(code: tl.tensor) -> tl.tensor:
    """float32 of an E2M1 code 0..15 held in an int32; code 8 is plain 0."""
    magnitude = code & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code >= 8, 0.0 - value, value)
