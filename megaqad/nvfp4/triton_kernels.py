"""Triton kernels: the same bits as the reference from one read of the input.

One program takes ``TILE`` blocks. It reads the elements two at a time, as one machine word, so that the two codes of a
byte are computed side by side and nothing has to be shuffled between threads: a 16-bit pair is an int32, a float32 pair
an int64. What is done with them, and why it gives the same bits everywhere, is in ``triton_numbers``.

A quotient that underflows to zero is told from one that does not by comparing dividend and divisor, both scaled: it
decides between code 0 and code 8, and whether a block counts as zero.

Compiled for Hopper, a BF16 element costs 19 instructions on the way to its value, 23 to its code, 27 to both, and 11
back from it, 9 to 13 of them (5 back) on the pipe for integers and comparisons, which is half as wide as that for
multiply-adds. At 4 bytes read and written per value that is half of what an H200's multiprocessors can issue in the
time in which its memory moves them. Counted in the machine code, without the path for tiny tensors; not measured.

Needs Triton, and a CUDA device unless the process runs with ``TRITON_INTERPRET=1``. Imported only when asked for.
"""

# ruff: noqa: SIM108 - kernels choose by if and else, at compile time or for all blocks of a program
import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaqad.nvfp4 import vectorized
from megaqad.nvfp4.format import BLOCK_SIZE, MIN_GLOBAL_SCALE, NVFP4Tensor, global_scale_from_amax
from megaqad.nvfp4.triton_numbers import (
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    join_word,
    largest,
    quotient,
    reciprocal,
    round_to_e2m1,
    round_to_e4m3,
    split_word,
)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when the kernels are made, as Triton does

_TILE = 1024 if _INTERPRETED else 256  # blocks per program; compiled, that is 32 elements a thread
_AMAX_TILE = 512  # blocks per step; that is 8 reads of 16 bytes a thread
_WORDS = BLOCK_SIZE // 2  # words per block
_MIN_GLOBAL_SCALE = tl.constexpr(MIN_GLOBAL_SCALE)
_SAFE_GLOBAL_SCALE = tl.constexpr(2.0**-90)
_MIN_E4M3 = tl.constexpr(2.0**-9)
_UP = tl.constexpr(2.0**120)
_DOWN = tl.constexpr(2.0**-30)
_FORMAT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def run(
    x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None, *, want_values: bool, want_codes: bool
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    """As ``reference.run``, bit for bit."""
    _check_runnable(x.device)
    x = _in_words(x)
    amax = _tensor_amax(x) if amax is None else amax.contiguous()
    lead, k = x.shape[:-1], x.shape[-1]
    values = x.new_empty(x.shape) if want_values else None  # dense whatever strides x has where it is 1
    codes = x.new_empty((*lead, k // 2), dtype=torch.uint8) if want_codes else None
    scales = x.new_empty((*lead, k // BLOCK_SIZE), dtype=torch.uint8) if want_codes else None
    blocks, rows = x.numel() // BLOCK_SIZE, amax.numel()
    global_scale = torch.empty_like(amax) if blocks else global_scale_from_amax(amax)
    if blocks:
        words = _as_words(x)  # also in the place of what is not wanted
        with _on_device_of(x):
            _quantize_kernel[(triton.cdiv(blocks, _TILE),)](
                words, amax, amax if block_amax is None else block_amax.contiguous(),
                words if values is None else _as_words(values), words if codes is None else codes,
                words if scales is None else scales, global_scale, blocks, blocks // rows,
                FORMAT=_FORMAT[x.dtype], PER_ROW=rows > 1, CHOSEN=block_amax is not None, WANT_VALUES=want_values,
                WANT_CODES=want_codes, INTERPRETED=_INTERPRETED, TILE=_TILE, WORDS=_WORDS, enable_fp_fusion=False,
            )  # fmt: skip
    if codes is None or scales is None:
        return values, None
    return values, NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), global_scale)


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


def squared_errors(blocks: Tensor, scales: Tensor) -> Tensor:
    """As ``reference.squared_errors``, bit for bit; there is no kernel for it."""
    return vectorized.squared_errors(blocks, scales)


def row_amax(x: Tensor) -> Tensor:
    """As ``reference.row_amax``, bit for bit but for the payload of NaN."""
    _check_runnable(x.device)
    if x.shape[-1] % BLOCK_SIZE or x.numel() == 0:
        return vectorized.row_amax(x)
    x = _in_words(x)
    bits = torch.empty((*x.shape[:-1], 1), dtype=torch.int32, device=x.device)
    blocks = x.shape[-1] // BLOCK_SIZE
    tile = min(triton.next_power_of_2(blocks), _AMAX_TILE)
    with _on_device_of(x):
        _amax_kernel[(bits.numel(), 1)](
            _as_words(x), bits, blocks, FORMAT=_FORMAT[x.dtype], STEPS=triton.cdiv(blocks, tile), ATOMIC=False,
            TILE=tile, WORDS=_WORDS,
        )  # fmt: skip
    return bits.view(torch.float32)


def _tensor_amax(x: Tensor) -> Tensor:
    """``format.tensor_amax`` of what ``_in_words`` gives, in one pass."""
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    blocks = x.numel() // BLOCK_SIZE
    if blocks:
        with _on_device_of(x):
            _amax_kernel[(1, triton.cdiv(blocks, _AMAX_TILE))](
                _as_words(x), bits, blocks, FORMAT=_FORMAT[x.dtype], STEPS=1, ATOMIC=True, TILE=_AMAX_TILE,
                WORDS=_WORDS,
            )  # fmt: skip
    return bits.view(torch.float32)


def _in_words(x: Tensor) -> Tensor:
    """Dense, and pairs of elements do not straddle words."""
    x = x.detach().contiguous()
    return x.clone() if x.storage_offset() % 2 else x


def _check_runnable(device: torch.device) -> None:
    if device.type != "cuda" and not _INTERPRETED:
        raise ValueError(
            f"impl='triton' runs on CUDA, not on {device}: "
            "use impl='auto', or set TRITON_INTERPRET=1 to debug the kernels"
        )


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device; to change it takes time, so only where it is another."""
    elsewhere = x.device.type == "cuda" and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else nullcontext()


def _as_words(x: Tensor) -> Tensor:
    """Contiguous ``x`` two elements at a time: int32 for 16-bit dtypes, int64 for float32."""
    return x.view(-1).view(torch.int64 if x.dtype == torch.float32 else torch.int32)


@triton.jit
def _amax_kernel(
    x_words: tl.tensor, amax: tl.tensor, blocks: tl.tensor,
    FORMAT: tl.constexpr, STEPS: tl.constexpr, ATOMIC: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """x_words [rows, blocks, 8] -> bits of the largest magnitude of each row, int32 [rows]; a grid of rows x parts.

    A part of ``STEPS`` tiles is all of its row, or ATOMIC: one that raises what ``amax`` holds.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    words = blocks * WORDS  # as a product, so that the compiler knows its factor and reads 16 bytes at a time
    top = tl.zeros([TILE * WORDS], tl.float32)
    for step in range(STEPS):
        at = (part * STEPS + step) * (TILE * WORDS) + tl.arange(0, TILE * WORDS)
        even, odd = split_word(tl.load(x_words + row * words + at, mask=at < words, other=0), FORMAT)
        pair = tl.maximum(tl.abs(even), tl.abs(odd), propagate_nan=tl.PropagateNan.ALL)
        top = tl.maximum(top, pair, propagate_nan=tl.PropagateNan.ALL)
    bits = tl.max(top.to(tl.int32, bitcast=True), axis=0)  # non-negative floats order as their bits do
    if ATOMIC:
        tl.atomic_max(amax, bits)
    else:
        tl.store(amax + row, bits)


@triton.jit
def _rows_of(pid: tl.tensor, blocks_per_row: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Row of each of this program's blocks, int64 [TILE]. In 64 bits only one number is divided."""
    first = pid * TILE
    row = first // blocks_per_row
    within = (first - row * blocks_per_row).to(tl.int32)
    return row + (within + tl.arange(0, TILE)) // blocks_per_row


@triton.jit
def _block_scales(
    top: tl.tensor, s2: tl.tensor, exact: tl.tensor, SHORT: tl.constexpr, CHOSEN: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """E4M3 values of the block scales for block amaxes ``top`` [TILE] under the global scales ``s2`` [] or [TILE]."""
    divisor = s2 * 6.0
    quotient_is_zero = tl.abs(top) * _UP <= divisor * _DOWN
    if exact:
        ideal = tl.div_rn(tl.abs(top), tl.broadcast_to(divisor, top.shape))
    else:
        limit = divisor * 450.0  # what lies above it becomes 448 in any case, and could overflow on the way
        bounded = tl.minimum(tl.abs(top), limit, propagate_nan=tl.PropagateNan.ALL)
        r = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
        ideal = quotient(bounded, divisor, r, SHORT)
    ideal = tl.maximum(ideal, _MIN_E4M3, propagate_nan=tl.PropagateNan.ALL)
    if CHOSEN:
        ideal = tl.where(top < 0, _MIN_E4M3, ideal)
    ideal = tl.minimum(ideal, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return round_to_e4m3(tl.where(quotient_is_zero, 1.0, ideal))


@triton.jit
def _units(
    x: tl.tensor, scale: tl.tensor, limit: tl.tensor, r: tl.tensor, exact: tl.tensor, SHORT: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """``x / scale`` rounded to E2M1's values, with everything beyond 6 at 6."""
    x = tl.maximum(tl.minimum(x, limit), -limit)  # NaN becomes the limit
    if exact:
        y = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        y = quotient(x, scale, r, SHORT)
    return round_to_e2m1(y)


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
    SHORT: tl.constexpr = FORMAT != "fp32"
    pid = tl.program_id(0).to(tl.int64)
    block = pid * TILE + tl.arange(0, TILE)
    at = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [TILE, 8]
    inside = block < blocks

    if PER_ROW:
        row = _rows_of(pid, blocks_per_row, TILE)
        s2 = tl.div_rn(tl.load(amax + row, mask=inside, other=0.0), tl.full(row.shape, 2688.0, tl.float32))
        s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)  # [TILE]
        tl.store(global_scale + row, s2, mask=inside & (block == row * blocks_per_row))
        exact = tl.max((inside & (s2 < _SAFE_GLOBAL_SCALE)).to(tl.int32)) > 0
    else:
        s2 = tl.div_rn(tl.load(amax), 2688.0)
        s2 = tl.where(s2 < _MIN_GLOBAL_SCALE, _MIN_GLOBAL_SCALE, s2)  # []
        if pid == 0:
            tl.store(global_scale, s2)
        exact = s2 < _SAFE_GLOBAL_SCALE

    even, odd = split_word(tl.load(x_words + at, mask=inside[:, None], other=0), FORMAT)
    top = tl.load(chosen + block, mask=inside, other=0.0) if CHOSEN else largest(even, odd)
    block_scale = _block_scales(top, s2, exact, SHORT and not CHOSEN, CHOSEN)  # [TILE]
    # Under an infinite global scale every value is NaN.
    scale = block_scale * tl.where(s2 < float("inf"), s2, float("nan"))
    r = reciprocal(scale, SHORT, INTERPRETED)[:, None]
    scale, limit = scale[:, None], (scale * 6.5)[:, None]
    even_units = _units(even, scale, limit, r, exact, SHORT)
    odd_units = _units(odd, scale, limit, r, exact, SHORT)

    if WANT_CODES:
        underflow = scale * _DOWN
        even_code, odd_code = e2m1_code(even_units), e2m1_code(odd_units)
        even_code = tl.where(even * -_UP > underflow, even_code | 8, even_code)
        odd_code = tl.where(odd * -_UP > underflow, odd_code | 8, odd_code)
        tl.store(scales + block, e4m3_byte(block_scale).to(tl.uint8), mask=inside)
        tl.store(codes + at, (even_code | (odd_code << 4)).to(tl.uint8), mask=inside[:, None])
    if WANT_VALUES:
        word = join_word(even_units * scale, odd_units * scale, FORMAT, INTERPRETED)
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
