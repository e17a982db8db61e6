"""Triton kernels: the same bits as the reference from one read of the input.

One program takes ``TILE`` blocks. It reads the elements two at a time, as one machine word, so that the two codes of a
byte are computed side by side and nothing has to be shuffled between threads: a 16-bit pair is an int32, a float32 pair
an int64. What is done with them, and why it gives the same bits everywhere, is in ``triton_numbers``.

A quotient that underflows to zero is told from one that does not by comparing dividend and divisor, both scaled: it
decides between code 0 and code 8, and whether a block counts as zero.

Needs Triton, and a CUDA device unless the process runs with ``TRITON_INTERPRET=1``. Imported only when asked for.
"""

# ruff: noqa: PLR0124 - kernels ask for NaN by x == x
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaqad.nvfp4.format import BLOCK_SIZE, MIN_GLOBAL_SCALE, NVFP4Tensor, global_scale_from_amax, tensor_amax
from megaqad.nvfp4.triton_numbers import (
    divide,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    join_word,
    magnitude_bits,
    round_to_e2m1,
    round_to_e4m3,
    split_word,
    with_sign,
)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when the kernels are made, as Triton does

_TILE = 1024 if _INTERPRETED else 256  # blocks per program; compiled, that is 32 elements a thread
_WORDS = BLOCK_SIZE // 2  # words per block
_MIN_GLOBAL_SCALE = tl.constexpr(MIN_GLOBAL_SCALE)
_SAFE_GLOBAL_SCALE = tl.constexpr(2.0**-90)
_MIN_E4M3 = tl.constexpr(2.0**-9)
_UP = tl.constexpr(2.0**120)
_DOWN = tl.constexpr(2.0**-30)
_FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def quantize(x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None) -> NVFP4Tensor:
    """As ``reference.quantize``, bit for bit."""
    _, q = _launch_quantize(x, amax, want_values=False, want_codes=True, block_amax=block_amax)
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
    codes, scales, global_scale = (t.contiguous() for t in (q.codes, q.block_scales, q.global_scale))
    out = torch.empty(q.shape, dtype=dtype, device=codes.device)
    blocks, rows = scales.numel(), global_scale.numel()
    if blocks:
        with _on_device_of(out):
            _dequantize_kernel[(triton.cdiv(blocks, _TILE),)](
                codes, scales.view(torch.uint8), global_scale, _as_words(out), blocks, blocks // rows,
                FORMAT=_FORMAT[dtype], PER_ROW=rows > 1, INTERPRETED=_INTERPRETED, TILE=_TILE, WORDS=_WORDS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _launch_quantize(
    x: Tensor, amax: Tensor | None, want_values: bool, want_codes: bool, block_amax: Tensor | None = None
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    _check_runnable(x.device)
    x = x.detach().contiguous()
    if x.storage_offset() % 2:
        x = x.clone()  # pairs would straddle words
    amax = tensor_amax(x) if amax is None else amax.contiguous()
    values = x.new_empty(x.shape) if want_values else None  # dense whatever strides x has where it is 1
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // 2) if want_codes else 0, dtype=torch.uint8)
    scales = x.new_empty((*lead, k // BLOCK_SIZE) if want_codes else 0, dtype=torch.uint8)
    blocks, rows = x.numel() // BLOCK_SIZE, amax.numel()
    global_scale = torch.empty_like(amax) if blocks else global_scale_from_amax(amax)
    chosen = amax if block_amax is None else block_amax.contiguous()
    if blocks:
        with _on_device_of(x):
            _quantize_kernel[(triton.cdiv(blocks, _TILE),)](
                _as_words(x), amax, chosen, _as_words(x if values is None else values), codes, scales, global_scale,
                blocks, blocks // rows,
                FORMAT=_FORMAT[x.dtype], PER_ROW=rows > 1, CHOSEN=block_amax is not None, WANT_VALUES=want_values,
                WANT_CODES=want_codes, INTERPRETED=_INTERPRETED, TILE=_TILE, WORDS=_WORDS, enable_fp_fusion=False,
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
def _rows_of(pid: tl.tensor, blocks_per_row: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Row of each of this program's blocks, int64 [TILE]. In 64 bits only one number is divided."""
    first = pid * TILE
    row = first // blocks_per_row
    within = (first - row * blocks_per_row).to(tl.int32)
    return row + (within + tl.arange(0, TILE)) // blocks_per_row


@triton.jit
def _block_scales(top: tl.tensor, s2: tl.tensor, exact: tl.tensor) -> tl.tensor:
    """E4M3 values of the block scales for block amaxes ``top`` [TILE] under the global scales ``s2`` [] or [TILE]."""
    negative = top < 0  # only a chosen one
    top = tl.abs(top)
    divisor = tl.full(top.shape, 6.0, tl.float32) * s2
    if exact:
        ideal = tl.div_rn(top, divisor)
    else:
        reciprocal = tl.div_rn(tl.full(top.shape, 1.0, tl.float32), divisor)
        ideal = divide(top, divisor, reciprocal)
        # The only NaN that was not one before is an overflow.
        ideal = tl.where((ideal != ideal) & (top == top), 448.0, ideal)
    ideal = tl.where((ideal < _MIN_E4M3) | negative, _MIN_E4M3, ideal)
    ideal = tl.where(ideal > 448.0, 448.0, ideal)
    ideal = tl.where(top * _UP <= divisor * _DOWN, 1.0, ideal)  # the quotient is 0
    return round_to_e4m3(ideal)


@triton.jit
def _quantize_kernel(
    x_words: tl.tensor, amax: tl.tensor, chosen: tl.tensor, value_words: tl.tensor, codes: tl.tensor,
    scales: tl.tensor, global_scale: tl.tensor, blocks: tl.tensor, blocks_per_row: tl.tensor,
    FORMAT: tl.constexpr, PER_ROW: tl.constexpr, CHOSEN: tl.constexpr, WANT_VALUES: tl.constexpr,
    WANT_CODES: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """x_words [blocks, 8], amax [] -> value_words [blocks, 8], codes [blocks, 8], scales [blocks], global_scale [].

    PER_ROW: amax and global_scale [blocks / blocks_per_row]. CHOSEN: the blocks' amax are chosen [blocks].
    """
    pid = tl.program_id(0).to(tl.int64)
    block = pid * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [TILE, 8]
    inside = block < blocks

    if PER_ROW:
        row = _rows_of(pid, blocks_per_row, TILE)
        s2 = tl.div_rn(tl.load(amax + row, mask=inside, other=0.0), tl.full(row.shape, 2688.0, tl.float32))
        s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)  # [TILE]
        tl.store(global_scale + row, s2, mask=inside & (block == row * blocks_per_row))
        exact = INTERPRETED or tl.max((inside & (s2 < _SAFE_GLOBAL_SCALE)).to(tl.int32)) > 0
    else:
        s2 = tl.div_rn(tl.load(amax), 2688.0)
        s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)  # []
        if pid == 0:
            tl.store(global_scale, s2)
        exact = INTERPRETED or s2 < _SAFE_GLOBAL_SCALE

    even, odd = split_word(tl.load(x_words + at, mask=inside[:, None], other=0), FORMAT)
    if CHOSEN:
        top = tl.load(chosen + block, mask=inside, other=0.0)
    else:
        top = tl.max(tl.maximum(magnitude_bits(even), magnitude_bits(odd)), axis=1).to(tl.float32, bitcast=True)
    block_scale = _block_scales(top, s2, exact)  # [TILE]
    scale = (block_scale * s2)[:, None]
    # Under an infinite global scale everything is NaN, also what overflows on the way.
    scale = tl.where(scale < float("inf"), scale, float("nan"))

    if exact:
        divisor = tl.broadcast_to(scale, even.shape)
        even_units, odd_units = tl.div_rn(tl.abs(even), divisor), tl.div_rn(tl.abs(odd), divisor)
    else:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        even_units, odd_units = divide(tl.abs(even), scale, reciprocal), divide(tl.abs(odd), scale, reciprocal)
    even_magnitude, even_code = round_to_e2m1(even_units)
    odd_magnitude, odd_code = round_to_e2m1(odd_units)

    if WANT_CODES:
        underflow = scale * _DOWN
        even_code = tl.where(-even * _UP > underflow, even_code + 8, even_code)
        odd_code = tl.where(-odd * _UP > underflow, odd_code + 8, odd_code)
        tl.store(scales + block, e4m3_byte(block_scale).to(tl.uint8), mask=inside)
        tl.store(codes + at, (even_code | (odd_code << 4)).to(tl.uint8), mask=inside[:, None])
    if WANT_VALUES:
        word = join_word(
            with_sign(even_magnitude, even, scale), with_sign(odd_magnitude, odd, scale), FORMAT, INTERPRETED
        )
        tl.store(value_words + at, word, mask=inside[:, None])


@triton.jit
def _dequantize_kernel(
    codes: tl.tensor, scales: tl.tensor, global_scale: tl.tensor, value_words: tl.tensor, blocks: tl.tensor,
    blocks_per_row: tl.tensor,
    FORMAT: tl.constexpr, PER_ROW: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """codes [blocks, 8], scales [blocks], global_scale [], or one per row -> value_words [blocks, 8]."""
    pid = tl.program_id(0).to(tl.int64)
    block = pid * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = block < blocks
    byte = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    if PER_ROW:
        s2 = tl.load(global_scale + _rows_of(pid, blocks_per_row, TILE), mask=inside, other=0.0)
    else:
        s2 = tl.load(global_scale)
    scale = (e4m3_value(byte) * s2)[:, None]
    pair = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    even, odd = e2m1_value(pair & 0xF) * scale, e2m1_value(pair >> 4) * scale
    tl.store(value_words + at, join_word(even, odd, FORMAT, INTERPRETED), mask=inside[:, None])
