"""Triton kernels: the same bits as the reference from one read of the input.

One program takes ``TILE`` blocks. It reads the elements two at a time, as one machine word, so that the two codes of a
byte are computed side by side and nothing has to be shuffled between threads: a 16-bit pair is an int32, a float32 pair
an int64. Everything after that is float32 and integer arithmetic that IEEE 754 pins down, the same bits on any device
and in Triton's interpreter:

Division is correctly rounded, which Triton's ``/`` is not. ``div_rn`` is, at a dozen instructions, as many as all the
rest of an element's work. ``_divide`` needs five: from a correctly rounded reciprocal ``r`` of the divisor, shared by
the block, one fused multiply-add pair makes ``a * r`` faithful, and a second one makes it correctly rounded (Markstein,
IBM J. Res. Dev. 34, 1990). It holds while the remainders are representable, which below a global scale of 2**-90 they
may not be; a tensor that small takes ``div_rn``, and so does the interpreter, whose ``fma`` rounds twice.

Rounding to E2M1 and E4M3 is by adding and subtracting a large power of two; see ``vectorized``. Casts to FP8 would be
right when compiled and wrong in the interpreter, as those to BF16 are: there that one is spelled out on the bits.

A quotient that underflows to zero is told from one that does not by comparing dividend and divisor, both scaled: it
decides between code 0 and code 8, and whether a block counts as zero.

Needs Triton, and a CUDA device unless the process runs with ``TRITON_INTERPRET=1``. Imported only when asked for.
"""

# ruff: noqa: PLR0124, RET505 - kernels ask for NaN by x == x, and choose at compile time by if and else
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaqad.nvfp4.format import BLOCK_SIZE, MIN_GLOBAL_SCALE, NVFP4Tensor, tensor_amax

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when the kernels are made, as Triton does

_TILE = 1024 if _INTERPRETED else 256  # blocks per program; compiled, that is 32 elements a thread
_WORDS = BLOCK_SIZE // 2  # words per block
_MIN_GLOBAL_SCALE = tl.constexpr(MIN_GLOBAL_SCALE)
_SAFE_GLOBAL_SCALE = tl.constexpr(2.0**-90)
_EXPONENT = tl.constexpr(0x7F800000)
_ONE_BITS = tl.constexpr(0x3F800000)
_MIN_NORMAL_E4M3 = tl.constexpr(2.0**-6)
_MIN_NORMAL_E4M3_BITS = tl.constexpr(0x3C800000)
_MIN_E4M3 = tl.constexpr(2.0**-9)
_UP = tl.constexpr(2.0**120)
_DOWN = tl.constexpr(2.0**-30)
_FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def quantize(x: Tensor, amax: Tensor | None) -> NVFP4Tensor:
    """As ``reference.quantize``, bit for bit."""
    _, q = _launch_quantize(x, amax, want_values=False, want_codes=True)
    assert q is not None
    return q


def fake_quantize(x: Tensor, amax: Tensor | None) -> Tensor:
    """As ``reference.fake_quantize``, bit for bit."""
    values, _ = _launch_quantize(x, amax, want_values=True, want_codes=False)
    assert values is not None
    return values


def fake_quantize_packed(x: Tensor, amax: Tensor | None) -> tuple[Tensor, NVFP4Tensor]:
    """As ``reference.fake_quantize_packed``, bit for bit."""
    values, q = _launch_quantize(x, amax, want_values=True, want_codes=True)
    assert values is not None
    assert q is not None
    return values, q


def dequantize(q: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize``, bit for bit."""
    _check_runnable(q.codes.device)
    codes, scales = q.codes.contiguous(), q.block_scales.contiguous()
    out = torch.empty(q.shape, dtype=dtype, device=codes.device)
    blocks = scales.numel()
    if blocks:
        with _on_device_of(out):
            _dequantize_kernel[(triton.cdiv(blocks, _TILE),)](
                codes, scales.view(torch.uint8), q.global_scale, _as_words(out), blocks,
                FORMAT=_FORMAT[dtype], INTERPRETED=_INTERPRETED, TILE=_TILE, WORDS=_WORDS, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _launch_quantize(
    x: Tensor, amax: Tensor | None, want_values: bool, want_codes: bool
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    _check_runnable(x.device)
    x = x.detach().contiguous()
    if x.storage_offset() % 2:
        x = x.clone()  # pairs would straddle words
    amax = tensor_amax(x) if amax is None else amax
    values = torch.empty_like(x) if want_values else None
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // 2) if want_codes else 0, dtype=torch.uint8)
    scales = x.new_empty((*lead, k // BLOCK_SIZE) if want_codes else 0, dtype=torch.uint8)
    global_scale = x.new_empty((), dtype=torch.float32)
    blocks = x.numel() // BLOCK_SIZE
    with _on_device_of(x):
        # At least one program, which leaves the global scale even when there are no rows.
        _quantize_kernel[(max(1, triton.cdiv(blocks, _TILE)),)](
            _as_words(x), amax, _as_words(x if values is None else values), codes, scales, global_scale, blocks,
            FORMAT=_FORMAT[x.dtype], WANT_VALUES=want_values, WANT_CODES=want_codes, INTERPRETED=_INTERPRETED,
            TILE=_TILE, WORDS=_WORDS, enable_fp_fusion=False,
        )  # fmt: skip
    if not want_codes:
        return values, None
    return values, NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), global_scale)


def _check_runnable(device: torch.device) -> None:
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"impl='triton' runs on CUDA, not on {device}: "
            "use impl='auto', or set TRITON_INTERPRET=1 to debug the kernels"
        )


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _as_words(x: Tensor) -> Tensor:
    """Contiguous ``x`` two elements at a time: int32 for 16-bit dtypes, int64 for float32."""
    return x.view(-1).view(torch.int64 if x.dtype == torch.float32 else torch.int32)


@triton.jit
def _split_word(word: tl.tensor, FORMAT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
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
def _join_word(even: tl.tensor, odd: tl.tensor, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
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
def _magnitude_bits(v: tl.tensor) -> tl.tensor:
    """Bits of ``abs(v)``: non-negative floats order as these integers do, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _divide(a: tl.tensor, b: tl.tensor, r: tl.tensor) -> tl.tensor:
    """``a / b`` correctly rounded, for ``r`` the correctly rounded ``1 / b``; NaN where it overflows."""
    faithful = a * r
    faithful = tl.fma(tl.fma(-b, faithful, a), r, faithful)
    return tl.fma(tl.fma(-b, faithful, a), r, faithful)


@triton.jit
def _round_to_e4m3(s: tl.tensor) -> tl.tensor:
    """Round float32 in 2**-9..448 to the values of E4M3, ties to even; NaN stays NaN."""
    power = tl.maximum(s.to(tl.int32, bitcast=True) & _EXPONENT, _MIN_NORMAL_E4M3_BITS)
    rounder = (power + (20 << 23)).to(tl.float32, bitcast=True)
    return (s + rounder) - rounder


@triton.jit
def _e4m3_byte(v: tl.tensor) -> tl.tensor:
    """The byte, in an int32, of a value of E4M3."""
    normal = (v.to(tl.int32, bitcast=True) >> 20) - 960  # keep three mantissa bits, move the exponent's bias to 7
    byte = tl.where(v < _MIN_NORMAL_E4M3, (v * 512).to(tl.int32), normal)
    return tl.where(v == v, byte, 0x7F)


@triton.jit
def _e4m3_value(byte: tl.tensor) -> tl.tensor:
    """float32 of an E4M3 byte held in an int32."""
    magnitude = byte & 0x7F
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * _MIN_E4M3, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@triton.jit
def _round_to_e2m1(y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Magnitude and code 0..7 of a non-negative float32, ties to even; beyond 6, and for NaN, 6 and 7."""
    y = tl.where(y < 6.0, y, 6.0)
    power = tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT, _ONE_BITS)  # of 1, 2 or 4
    rounder = power + (22 << 23)  # 2**22 times that: its last place is worth half of it
    total = y + rounder.to(tl.float32, bitcast=True)
    magnitude = total - rounder.to(tl.float32, bitcast=True)
    code = (total.to(tl.int32, bitcast=True) - rounder) + ((power - _ONE_BITS) >> 22)
    return magnitude, code


@triton.jit
def _with_sign(magnitude: tl.tensor, x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """``magnitude * scale`` with the sign of ``x``, zeros positive: adding +0.0 turns -0.0 into it and no other bit."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    signed = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.fma(signed, tl.broadcast_to(scale, signed.shape), tl.zeros(signed.shape, tl.float32))


@triton.jit
def _e2m1_value(code: tl.tensor) -> tl.tensor:
    """float32 of an E2M1 code 0..15 held in an int32; code 8 is plain 0."""
    magnitude = code & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code >= 8, 0.0 - value, value)


@triton.jit
def _block_scales(top: tl.tensor, s2: tl.tensor, exact: tl.tensor) -> tl.tensor:
    """E4M3 values of the block scales for block amaxes ``top`` [TILE] under the global scale ``s2`` []."""
    divisor = tl.full(top.shape, 6.0, tl.float32) * s2
    if exact:
        ideal = tl.div_rn(top, divisor)
    else:
        reciprocal = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), divisor)
        ideal = _divide(top, divisor, reciprocal)
        # The only NaN that was not one before is an overflow.
        ideal = tl.where((ideal != ideal) & (top == top), 448.0, ideal)
    ideal = tl.where(ideal < _MIN_E4M3, _MIN_E4M3, ideal)
    ideal = tl.where(ideal > 448.0, 448.0, ideal)
    ideal = tl.where(top * _UP <= divisor * _DOWN, 1.0, ideal)  # the quotient is 0
    return _round_to_e4m3(ideal)


@triton.jit
def _quantize_kernel(
    x_words: tl.tensor, amax: tl.tensor, value_words: tl.tensor, codes: tl.tensor, scales: tl.tensor,
    global_scale: tl.tensor, blocks: tl.tensor,
    FORMAT: tl.constexpr, WANT_VALUES: tl.constexpr, WANT_CODES: tl.constexpr, INTERPRETED: tl.constexpr,
    TILE: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """x_words [blocks, 8], amax [] -> value_words [blocks, 8], codes [blocks, 8], scales [blocks], global_scale []."""
    pid = tl.program_id(0).to(tl.int64)
    block = pid * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [TILE, 8]
    inside = block < blocks

    s2 = tl.div_rn(tl.load(amax), 2688.0)
    s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)
    if pid == 0:
        tl.store(global_scale, s2)
    exact = INTERPRETED or s2 < _SAFE_GLOBAL_SCALE

    even, odd = _split_word(tl.load(x_words + at, mask=inside[:, None], other=0), FORMAT)
    top = tl.max(tl.maximum(_magnitude_bits(even), _magnitude_bits(odd)), axis=1).to(tl.float32, bitcast=True)
    block_scale = _block_scales(top, s2, exact)  # [TILE]
    scale = (block_scale * s2)[:, None]
    # Under an infinite global scale everything is NaN, also what overflows on the way.
    scale = tl.where(scale < float("inf"), scale, float("nan"))

    if exact:
        divisor = tl.broadcast_to(scale, even.shape)
        even_units, odd_units = tl.div_rn(tl.abs(even), divisor), tl.div_rn(tl.abs(odd), divisor)
    else:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        even_units, odd_units = _divide(tl.abs(even), scale, reciprocal), _divide(tl.abs(odd), scale, reciprocal)
    even_magnitude, even_code = _round_to_e2m1(even_units)
    odd_magnitude, odd_code = _round_to_e2m1(odd_units)

    if WANT_CODES:
        underflow = scale * _DOWN
        even_code = tl.where(-even * _UP > underflow, even_code + 8, even_code)
        odd_code = tl.where(-odd * _UP > underflow, odd_code + 8, odd_code)
        tl.store(scales + block, _e4m3_byte(block_scale).to(tl.uint8), mask=inside)
        tl.store(codes + at, (even_code | (odd_code << 4)).to(tl.uint8), mask=inside[:, None])
    if WANT_VALUES:
        word = _join_word(
            _with_sign(even_magnitude, even, scale), _with_sign(odd_magnitude, odd, scale), FORMAT, INTERPRETED
        )
        tl.store(value_words + at, word, mask=inside[:, None])


@triton.jit
def _dequantize_kernel(
    codes: tl.tensor, scales: tl.tensor, global_scale: tl.tensor, value_words: tl.tensor, blocks: tl.tensor,
    FORMAT: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """codes [blocks, 8], scales [blocks], global_scale [] -> value_words [blocks, 8]."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = block < blocks
    byte = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    scale = (_e4m3_value(byte) * tl.load(global_scale))[:, None]
    pair = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    even, odd = _e2m1_value(pair & 0xF) * scale, _e2m1_value(pair >> 4) * scale
    tl.store(value_words + at, _join_word(even, odd, FORMAT, INTERPRETED), mask=inside[:, None])
