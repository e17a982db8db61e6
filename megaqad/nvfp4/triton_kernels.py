"""Triton kernels: the same bits as the reference from one read of the input.

One program takes ``TILE`` blocks. It reads the elements two at a time, as one machine word, so that the two codes of a
byte are computed side by side and nothing has to be shuffled between threads: a 16-bit pair is an int32, a float32 pair
an int64. Everything after that is float32 and integer arithmetic that IEEE 754 pins down: divisions are correctly
rounded (``div_rn``; the plain operator is not on a GPU), and conversions to E2M1, E4M3 and BF16 are spelled out on
bit patterns. So the compiled kernel and Triton's interpreter, whose own FP8 and BF16 casts round differently, agree
with each other and with the reference. The simpler choice, ``.to(tl.float8e4nv)``, would be right on one of the two.

Needs Triton, and a CUDA device unless the process runs with ``TRITON_INTERPRET=1``. Imported only when asked for.
"""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaqad.nvfp4.format import BLOCK_SIZE, MIN_GLOBAL_SCALE, NVFP4Tensor, tensor_amax

_TILE = 256  # blocks per program: 32 elements a thread at 4 warps
_WORDS = BLOCK_SIZE // 2  # words per block
_MIN_GLOBAL_SCALE = tl.constexpr(MIN_GLOBAL_SCALE)
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
                FORMAT=_FORMAT[dtype], TILE=_TILE, WORDS=_WORDS,
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
            FORMAT=_FORMAT[x.dtype], WANT_VALUES=want_values, WANT_CODES=want_codes, TILE=_TILE, WORDS=_WORDS,
        )  # fmt: skip
    if not want_codes:
        return values, None
    return values, NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), global_scale)


def _check_runnable(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' runs on CUDA, not on {device}: use impl='auto', or set TRITON_INTERPRET=1 to debug the kernels"
        )


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _as_words(x: Tensor) -> Tensor:
    """Contiguous ``x`` two elements at a time: int32 for 16-bit dtypes, int64 for float32."""
    return x.view(-1).view(torch.int64 if x.dtype == torch.float32 else torch.int32)


@triton.jit
def _split_word(word, FORMAT: tl.constexpr):
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
def _join_word(even, odd, FORMAT: tl.constexpr):
    """The word of two float32, each rounded to the format."""
    if FORMAT == "bf16":
        return (_bf16_bits(odd) << 16) | _bf16_bits(even)
    elif FORMAT == "fp16":
        low = even.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        high = odd.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return (high << 16) | (low & 0xFFFF)
    else:
        low, high = even.to(tl.int32, bitcast=True).to(tl.int64), odd.to(tl.int32, bitcast=True).to(tl.int64)
        return (high << 32) | (low & 0xFFFFFFFF)


@triton.jit
def _bf16_bits(v):
    """BF16 bits of a float32, in the low half of an int32: add just under half a step, more if that makes it even."""
    bits = v.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(v == v, rounded, 0x7FC0)


@triton.jit
def _magnitude_bits(v):
    """Bits of ``abs(v)``: non-negative floats order as these integers do, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e2m1(y):
    """E2M1 value (zeros positive) and code of a float32, ties to even; see ``vectorized`` for the idea."""
    a = tl.abs(y)
    a = tl.where(a < 6.0, a, 6.0)
    binade = a.to(tl.int32, bitcast=True) >> 23
    binade = tl.minimum(tl.maximum(binade, 127), 129)  # of 1, 2 or 4: below 1 the step is that of 1
    rounder = (binade + 22) << 23  # the bits of 2**22 times that, whose last place is worth half of it
    sum_ = a + rounder.to(tl.float32, bitcast=True)
    steps = sum_.to(tl.int32, bitcast=True) - rounder
    magnitude = sum_ - rounder.to(tl.float32, bitcast=True)
    code = steps + 2 * (binade - 127)
    negative = y < 0
    return tl.where(negative, 0.0 - magnitude, magnitude), tl.where(negative, code + 8, code)


@triton.jit
def _e4m3_byte(s):
    """E4M3 byte of a float32 between 2**-9 and 448, or NaN; ties to even."""
    bits = s.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # keep 3 mantissa bits; exponent bias 127 to 7
    subnormal = (s + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # the last place of 2**14 is worth 2**-9
    return tl.where(s == s, tl.where(s < 0.015625, subnormal, normal), 0x7F)


@triton.jit
def _e4m3_value(byte):
    """float32 of an E4M3 byte held in an int32."""
    magnitude = byte & 0x7F
    normal = ((magnitude + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@triton.jit
def _e2m1_value(code):
    """float32 of an E2M1 code 0..15 held in an int32; code 8 is plain 0."""
    magnitude = code & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code >= 8, 0.0 - value, value)


@triton.jit
def _quantize_kernel(
    x_words, amax, value_words, codes, scales, global_scale, blocks,
    FORMAT: tl.constexpr, WANT_VALUES: tl.constexpr, WANT_CODES: tl.constexpr,
    TILE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """x_words [blocks, 8], amax [] -> value_words [blocks, 8], codes [blocks, 8], scales [blocks], global_scale []."""
    pid = tl.program_id(0).to(tl.int64)
    block = pid * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [TILE, 8]
    inside = block < blocks

    s2 = tl.div_rn(tl.load(amax), 2688.0)
    s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)
    if pid == 0:
        tl.store(global_scale, s2)

    even, odd = _split_word(tl.load(x_words + at, mask=inside[:, None], other=0), FORMAT)
    top = tl.max(tl.maximum(_magnitude_bits(even), _magnitude_bits(odd)), axis=1)  # [TILE]
    ideal = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full((TILE,), 6.0, tl.float32) * s2)
    ideal = tl.where(ideal == 0, 1.0, ideal)
    ideal = tl.where(ideal < 0.001953125, 0.001953125, ideal)
    ideal = tl.where(ideal > 448.0, 448.0, ideal)
    byte = _e4m3_byte(ideal)
    scale = (_e4m3_value(byte) * s2)[:, None]

    even, even_code = _e2m1(tl.div_rn(even, tl.broadcast_to(scale, even.shape)))
    odd, odd_code = _e2m1(tl.div_rn(odd, tl.broadcast_to(scale, odd.shape)))
    if WANT_CODES:
        tl.store(scales + block, byte.to(tl.uint8), mask=inside)
        tl.store(codes + at, (even_code | (odd_code << 4)).to(tl.uint8), mask=inside[:, None])
    if WANT_VALUES:
        tl.store(value_words + at, _join_word(even * scale, odd * scale, FORMAT), mask=inside[:, None])


@triton.jit
def _dequantize_kernel(
    codes, scales, global_scale, value_words, blocks, FORMAT: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr
):
    """codes [blocks, 8], scales [blocks], global_scale [] -> value_words [blocks, 8]."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = block < blocks
    byte = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    scale = (_e4m3_value(byte) * tl.load(global_scale))[:, None]
    pair = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    even, odd = _e2m1_value(pair & 0xF) * scale, _e2m1_value(pair >> 4) * scale
    tl.store(value_words + at, _join_word(even, odd, FORMAT), mask=inside[:, None])
