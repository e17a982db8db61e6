"""The number formats inside Triton kernels: elements to float32 and back, rounding to E4M3 and E2M1, division.

Everything is float32 and integer arithmetic that IEEE 754 pins down, the same bits on any device and in Triton's
interpreter:

Division is correctly rounded, which Triton's ``/`` is not. ``div_rn`` is, at a dozen instructions, as many as all the
rest of an element's work. ``quotient`` needs three: ``a * r`` with the reciprocal ``r`` of the divisor, shared by the
block, and one fused multiply-add pair that corrects it (Markstein, IBM J. Res. Dev. 34, 1990). For dividends of up to
11 significant bits, which BF16 and FP16 are, that is right for every divisor when ``r`` is correctly rounded, and also
for what ``reciprocal`` makes of the hardware's estimate: tried for all of them (``tests/nvfp4/test_division.py``).
FP32 dividends take a correctly rounded ``r`` and a second pair. It holds while the remainders are representable, which
below a global scale of 2**-90 they may not be; a tensor that small takes ``div_rn``.

Rounding to E2M1 and E4M3 is by adding and subtracting a large number; see ``vectorized``. It is 1.5 times a power of
two, so that the last place of the sum is the same for both signs. Casts to FP8 would be right when compiled and wrong
in the interpreter, as those to BF16 are: there that one is spelled out on the bits.
"""

# ruff: noqa: PLR0124, RET505 - functions ask for NaN by x == x, and choose at compile time by if and else
import triton
import triton.language as tl

_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x007FFFFF)
_MIN_NORMAL_E4M3 = tl.constexpr(2.0**-6)
_MIN_E4M3 = tl.constexpr(2.0**-9)
_E4M3_ROUNDER = tl.constexpr(1.5 * 2.0**20)  # times 2**e: the last place of the sum is worth 2**(e - 3)
_E2M1_ROUNDER = tl.constexpr(1.5 * 2.0**22)  # 2**(e - 1)
_DOWN_TO_BITS = tl.constexpr(2.0**-126)  # E2M1 values times this have their codes where a float32's exponent begins
_UP_FROM_BITS = tl.constexpr(2.0**126)


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
def largest(even: tl.tensor, odd: tl.tensor) -> tl.tensor:
    """Largest magnitude of each row of two [rows, words]: float32 [rows], NaN where the row holds one."""
    pair = tl.maximum(tl.abs(even), tl.abs(odd), propagate_nan=tl.PropagateNan.ALL)
    # Non-negative floats order as their bits do, with NaN above infinity.
    return tl.max(pair.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(b: tl.tensor, SHORT: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """``1 / b`` of positive ``b``, correctly rounded; SHORT: near enough for dividends of 11 bits."""
    if SHORT and not INTERPRETED:
        estimate = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], dtype=tl.float32, is_pure=True, pack=1
        )
        r = tl.fma(tl.fma(-b, estimate, tl.full(b.shape, 1.0, tl.float32)), estimate, estimate)
        # For a mantissa of ones Newton's step ends a unit short: its reciprocal lies next to half way.
        bits = r.to(tl.int32, bitcast=True)
        ones = (b.to(tl.int32, bitcast=True) & _MANTISSA) == _MANTISSA
        return tl.where(ones, bits | 1, bits).to(tl.float32, bitcast=True)
    else:
        return tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)


@triton.jit
def quotient(a: tl.tensor, b: tl.tensor, r: tl.tensor, SHORT: tl.constexpr) -> tl.tensor:
    """``a / b`` correctly rounded, for ``r`` of ``reciprocal``; NaN where it overflows. SHORT: ``a`` has 11 bits."""
    q = a * r
    q = tl.fma(tl.fma(-b, q, a), r, q)
    if not SHORT:
        q = tl.fma(tl.fma(-b, q, a), r, q)
    return q


@triton.jit
def round_to_e4m3(s: tl.tensor) -> tl.tensor:
    """Round float32 in 2**-9..448 to the values of E4M3, ties to even; NaN stays NaN."""
    power = (s.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    power = tl.maximum(power, _MIN_NORMAL_E4M3)
    rounder = tl.full(s.shape, _E4M3_ROUNDER, tl.float32)
    return tl.fma(power, -rounder, tl.fma(power, rounder, s))


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
def round_to_e2m1(y: tl.tensor) -> tl.tensor:
    """Round float32 of a magnitude below 7 to the values of E2M1, ties to even, zeros positive; NaN stays NaN."""
    power = (y.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 1.0)  # 1, 2 or 4
    rounder = tl.full(y.shape, _E2M1_ROUNDER, tl.float32)
    return tl.fma(power, -rounder, tl.fma(power, rounder, y))


@triton.jit
def e2m1_code(v: tl.tensor) -> tl.tensor:
    """The code 0..7, in an int32, of the magnitude of a value of E2M1; 7 for NaN."""
    return ((tl.abs(v) * _DOWN_TO_BITS).to(tl.uint32, bitcast=True) >> 22).to(tl.int32) & 7


@triton.jit
def e2m1_value(code: tl.tensor) -> tl.tensor:
    """float32 of an E2M1 code 0..15 held in an int32; code 8 is plain 0."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    up = tl.full(code.shape, _UP_FROM_BITS, tl.float32)
    return tl.fma(bits.to(tl.float32, bitcast=True), up, tl.zeros(code.shape, tl.float32))  # -0.0 + 0.0 is 0.0
