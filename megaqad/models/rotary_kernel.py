"""Triton kernel of the rotary embedding: queries or keys read once and written once, whatever their strides.

A program takes all heads of a few at a time of one token: cosines and sines of its position are loaded once for them.
The gradient is the same rotation the other way. Needs CUDA, or ``TRITON_INTERPRET=1``; imported only when asked for.
"""

# ruff: noqa: ANN001 - the arguments of a kernel are positional, and no Python types
# mypy: disable-error-code="no-untyped-def"
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Of one program."""


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    batch,
    heads,
    stride_s,
    stride_b,
    stride_n,
    table_stride,
    half,
    dim,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    position, row = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    here = x + position * stride_s + row * stride_b + head * stride_n
    there = out + (token * heads + head) * dim
    c = tl.load(cos + position * table_stride + column, mask=column < half, other=0.0).to(tl.float32)
    s = tl.load(sin + position * table_stride + column, mask=column < half, other=0.0).to(tl.float32)
    if BACKWARD:
        s = -s
    first = tl.load(here + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(here + half + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(there + column, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(there + half + column, (second * c + first * s).to(out.dtype.element_ty), mask=inside)
    if KEPT > 0:
        rest = 2 * half + tl.arange(0, KEPT)[None, :]
        kept = (head < heads) & (rest < dim)
        tl.store(there + rest, tl.load(here + rest, mask=kept, other=0.0), mask=kept)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    length, batch, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1] // 2
    kept = dim - 2 * half
    _rotate_kernel[(length * batch, triton.cdiv(heads, _HEADS))](
        x,
        cos,
        sin,
        out,
        batch,
        heads,
        *x.stride()[:3],
        cos.stride(0),
        half,
        dim,
        BACKWARD=backward,
        HEADS=min(_HEADS, triton.next_power_of_2(heads)),
        HALF=triton.next_power_of_2(half),
        KEPT=triton.next_power_of_2(kept) if kept else 0,
    )
    return out


class _Rotate(torch.autograd.Function):
    """Forward and backward: one kernel; nothing is kept but the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = (cos, sin)
        return _launch(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _launch(grads[0], *ctx.tables, backward=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``Operations.rotate``; FP32 inside, rounded once. The result is dense."""
    return cast(Tensor, _Rotate.apply(x, cos, sin))
