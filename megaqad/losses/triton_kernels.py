"""The kernel of forward KL for CUDA: each logit is read once for the statistics and once for the gradient.

`_statistics` gives a row to one program. Every lane keeps its own running maxima and sums and meets the others once, at
the end of the row: no barrier per tile, about 20 instructions per logit, so the memory and not the arithmetic sets its
pace. A lane takes 16 bytes of neighbouring columns at a time, eight of BF16, in one load, and rescales its sums once
for all of them. When a lane's maxima move from m to m', its C moves with them:

    S' = S r,    C' = r_t [C + S_t ((m_t - m_t') - (m_s - m_s'))],    r = e^(m - m')

`_merge` puts the ranks' statistics together in FP64, a lane per token: one launch for what takes thirty operations of
PyTorch. `_gradient` is elementwise. Exponentials are base 2, with log2(e) / T folded into the one constant that
multiplies every difference from a maximum. Bytes moved: 4 per logit for statistics and 6 for the gradient in BF16.

Needs a CUDA device, or `TRITON_INTERPRET=1` in the environment before triton is imported, which runs the kernels in
NumPy on the CPU: slow, and how they are tested without a GPU. Imported only when asked for.
"""

# ruff: noqa: ANN001 - the arguments of a kernel are positional, and no Python types
# mypy: disable-error-code="no-untyped-def"
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaqad.losses import blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read when the kernels are made, as Triton does."""

_FLOOR = tl.constexpr(blocks.FLOOR)
_LOAD_BYTES = 16  # of one lane, in one instruction
_LANES = 4096 if INTERPRETED else 256  # in the interpreter a step costs the same whatever its size
_WARPS = 8
_GRADIENT_TILE = 32768 if INTERPRETED else 4096
_MERGE_TILE = 128


@triton.jit
def _load(logits, columns, inside) -> tl.tensor:
    """FP32, with -inf and what lies outside the row at the floor."""
    z = tl.load(logits + columns, mask=inside, other=_FLOOR).to(tl.float32)
    return tl.maximum(z, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _statistics(
    student,
    teacher,
    mask,
    out,
    tokens,
    columns,
    student_stride,
    teacher_stride,
    scale,
    WITH_TEACHER: tl.constexpr,
    WITH_MASK: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    if WITH_MASK and tl.load(mask + row) == 0:
        return
    student += row * student_stride
    teacher += row * teacher_stride
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    peak_s = tl.full([LANES], _FLOOR, tl.float32)
    sum_s = tl.zeros([LANES], tl.float32)
    peak_t = tl.full([LANES], _FLOOR, tl.float32)
    sum_t = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    for first in range(0, columns, LANES * WIDTH):
        inside = first + tile < columns
        z_s = _load(student, first + tile, inside)
        higher_s = tl.maximum(peak_s, tl.max(z_s, axis=1))
        drop_s = (peak_s - higher_s) * scale
        d_s = (z_s - higher_s[:, None]) * scale
        sum_s = sum_s * tl.exp2(drop_s) + tl.sum(tl.exp2(d_s), axis=1)
        peak_s = higher_s
        if WITH_TEACHER:
            z_t = _load(teacher, first + tile, inside)
            higher_t = tl.maximum(peak_t, tl.max(z_t, axis=1))
            drop_t = (peak_t - higher_t) * scale
            d_t = (z_t - higher_t[:, None]) * scale
            e_t = tl.exp2(d_t)
            r_t = tl.exp2(drop_t)
            cross = r_t * (cross + sum_t * (drop_t - drop_s)) + tl.sum(e_t * (d_t - d_s), axis=1)
            sum_t = sum_t * r_t + tl.sum(e_t, axis=1)
            peak_t = higher_t
    top_s = tl.max(peak_s, axis=0)
    drop_s = (peak_s - top_s) * scale
    tl.store(out + row, top_s)
    tl.store(out + tokens + row, tl.sum(sum_s * tl.exp2(drop_s), axis=0))
    if WITH_TEACHER:
        top_t = tl.max(peak_t, axis=0)
        drop_t = (peak_t - top_t) * scale
        r_t = tl.exp2(drop_t)
        tl.store(out + 2 * tokens + row, top_t)
        tl.store(out + 3 * tokens + row, tl.sum(sum_t * r_t, axis=0))
        # differences were in units of log2(e) / T
        total = tl.sum(r_t * (cross + sum_t * (drop_t - drop_s)), axis=0) * 0.6931471805599453
        tl.store(out + 4 * tokens + row, total)


@triton.jit
def _gradient(
    student,
    teacher,
    out,
    peaks,
    factors,
    tokens,
    columns,
    student_stride,
    teacher_stride,
    out_stride,
    scale,
    WITH_TEACHER: tl.constexpr,
    ROUND_TO_BF16: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    factor_s = tl.load(factors + row)
    factor_t = tl.load(factors + tokens + row) if WITH_TEACHER else 0.0
    # a row of zero factors is not read: it may hold NaN
    counted = column < tl.where((factor_s == 0) & (factor_t == 0), 0, columns)
    z_s = _load(student + row * student_stride, column, counted)
    value = tl.exp2((z_s - tl.load(peaks + row)) * scale) * factor_s
    if WITH_TEACHER:
        z_t = _load(teacher + row * teacher_stride, column, counted)
        value -= tl.exp2((z_t - tl.load(peaks + tokens + row)) * scale) * factor_t
    value = tl.where(counted, value, 0.0)
    if ROUND_TO_BF16:  # the interpreter's cast cuts off; compiled, the store rounds
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), value)  # noqa: PLR0124
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge(
    gathered,
    token_kl,
    peaks,
    sums,
    tokens,
    ranks,
    rank_stride,
    statistic_stride,
    TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    here = gathered + token
    top_s = tl.load(here, mask=inside, other=0.0).to(tl.float64)
    top_t = tl.load(here + 2 * statistic_stride, mask=inside, other=0.0).to(tl.float64)
    for rank in range(1, ranks):
        other = here + rank * rank_stride
        peak_s = tl.load(other, mask=inside, other=0.0).to(tl.float64)
        peak_t = tl.load(other + 2 * statistic_stride, mask=inside, other=0.0).to(tl.float64)
        top_s = tl.maximum(top_s, peak_s, propagate_nan=tl.PropagateNan.ALL)
        top_t = tl.maximum(top_t, peak_t, propagate_nan=tl.PropagateNan.ALL)
    total_s = tl.zeros([TILE], tl.float64)
    total_t = tl.zeros([TILE], tl.float64)
    cross = tl.zeros([TILE], tl.float64)
    for rank in range(0, ranks):
        other = here + rank * rank_stride
        drop_s = (tl.load(other, mask=inside, other=0.0).to(tl.float64) - top_s) / TEMPERATURE
        drop_t = (tl.load(other + 2 * statistic_stride, mask=inside, other=0.0).to(tl.float64) - top_t) / TEMPERATURE
        sum_s = tl.load(other + statistic_stride, mask=inside, other=1.0).to(tl.float64)
        sum_t = tl.load(other + 3 * statistic_stride, mask=inside, other=1.0).to(tl.float64)
        local = tl.load(other + 4 * statistic_stride, mask=inside, other=0.0).to(tl.float64)
        share_t = tl.exp(drop_t)
        total_s += sum_s * tl.exp(drop_s)
        total_t += sum_t * share_t
        cross += share_t * (local + sum_t * (drop_t - drop_s))
    tl.store(token_kl + token, cross / total_t - tl.log(total_t) + tl.log(total_s), mask=inside)
    tl.store(peaks + token, top_s.to(tl.float32), mask=inside)
    tl.store(peaks + tokens + token, top_t.to(tl.float32), mask=inside)
    tl.store(sums + token, total_s, mask=inside)
    tl.store(sums + tokens + token, total_t, mask=inside)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.numel() == 0 else logits.contiguous()


def statistics(student: Tensor, teacher: Tensor | None, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """See `blocks.statistics`; FP32."""
    student, teacher = _rows(student), None if teacher is None else _rows(teacher)
    tokens, columns = student.shape
    out = torch.zeros(2 if teacher is None else 5, tokens, dtype=torch.float32, device=student.device)
    if tokens == 0:
        return out
    _statistics[(tokens,)](
        student,
        student if teacher is None else teacher,
        student if mask is None else mask,
        out,
        tokens,
        columns,
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        math.log2(math.e) / temperature,
        WITH_TEACHER=teacher is not None,
        WITH_MASK=mask is not None,
        LANES=_LANES,
        WIDTH=_LOAD_BYTES // student.element_size(),
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
    return out


def merge(gathered: Tensor, *, temperature: float) -> blocks.KLSums:
    """See `blocks.merge`."""
    gathered = _rows(gathered)
    ranks, _, tokens = gathered.shape
    found = blocks.KLSums(
        gathered.new_empty(tokens, dtype=torch.float64),
        gathered.new_empty(2, tokens, dtype=torch.float32),
        gathered.new_empty(2, tokens, dtype=torch.float64),
    )
    if tokens:
        _merge[(triton.cdiv(tokens, _MERGE_TILE),)](
            gathered,
            found.token_kl,
            found.peaks,
            found.sums,
            tokens,
            ranks,
            *gathered.stride()[:2],
            TEMPERATURE=temperature,
            TILE=_MERGE_TILE,
            num_warps=4,
        )
    return found


def gradient(
    student: Tensor, teacher: Tensor | None, *, peaks: Tensor, factors: Tensor, temperature: float, out: Tensor
) -> Tensor:
    """See `blocks.gradient`."""
    student, teacher = _rows(student), None if teacher is None else _rows(teacher)
    tokens, columns = student.shape
    assert out.stride(-1) == 1 or out.numel() == 0
    if out.numel() == 0:
        return out
    _gradient[(tokens, triton.cdiv(columns, _GRADIENT_TILE))](
        student,
        student if teacher is None else teacher,
        out,
        peaks.contiguous(),
        factors.contiguous(),
        tokens,
        columns,
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        out.stride(0),
        math.log2(math.e) / temperature,
        WITH_TEACHER=teacher is not None,
        ROUND_TO_BF16=INTERPRETED and out.dtype == torch.bfloat16,
        TILE=_GRADIENT_TILE,
        num_warps=_WARPS,
        # fused, one of two equal products would be rounded and the other not: equal models would have a gradient
        enable_fp_fusion=False,
    )
    torch.autograd.graph.increment_version(out)  # autograd does not see a kernel's write
    return out
