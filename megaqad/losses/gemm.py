"""The four matrix products of a head and its gradient, with FP32 results from BF16 operands.

Why FP32 results: rounding a logit of 16 to BF16 moves it by up to 0.06, which is as large as the difference between a
student and its teacher late in distillation; the KL gradient is then 20-70 % noise. An accumulator is FP32 anyway, so
keeping its result costs memory for one chunk and nothing else.

On CUDA cuBLAS writes FP32 results directly. PyTorch's own CPU products cannot, but the MKL inside its x86 library can
(mkl.py). Where there is neither, the head is widened to FP32 a few thousand rows at a time: on a processor with BF16
units that takes four to five times as long. All functions are local: `head` [V_local, H] is this rank's shard.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megaqad.losses import mkl

_TILE_ELEMENTS = 1 << 22


def direct(hidden: Tensor, head: Tensor) -> bool:
    """Whether one library call gives the FP32 product of these BF16 operands.

    Then the gradient of the logits is wanted in BF16 too: rounding it once costs 2^-9 of each entry, as rounding the
    results to BF16 parameters' gradients does.
    """
    if hidden.dtype != torch.bfloat16 or head.dtype != torch.bfloat16:
        return False
    return head.is_cuda or (head.device.type == "cpu" and mkl.available())


def _tiles(head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the head in FP32: the head itself, or a tile of 16 MiB at a time."""
    if head.dtype == torch.float32:
        yield slice(0, head.shape[0]), head
        return
    rows = max(1, min(head.shape[0], _TILE_ELEMENTS // max(1, head.shape[1])))
    buffer = torch.empty(rows, head.shape[1], dtype=torch.float32, device=head.device)
    for first in range(0, head.shape[0], rows):
        tile = head[first : first + rows]
        yield slice(first, first + tile.shape[0]), buffer[: tile.shape[0]].copy_(tile)


def logits_(out: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """out [n, V_local] FP32 = hidden [n, H] @ head^T."""
    if direct(hidden, head):
        if out.is_cuda:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
        return mkl.mm_(out, hidden, head.t())
    hidden = hidden.float()
    for rows, tile in _tiles(head):
        torch.mm(hidden, tile.t(), out=out[:, rows])
    return out


def slope(logit_gradient: Tensor, spare: Tensor | None, *, narrow: bool) -> Tensor:
    """The logits' gradient [n, V_local] FP32 as the next two products want it: itself, or (`narrow`) in BF16.

    The BF16 copy takes the memory of `spare` [n, V_local] FP32, which is overwritten, if there is one.
    """
    if not narrow:
        return logit_gradient
    if spare is None:
        return logit_gradient.bfloat16()
    return spare.view(torch.bfloat16)[:, : logit_gradient.shape[1]].copy_(logit_gradient)


def hidden_gradient(slope: Tensor, head: Tensor) -> Tensor:
    """FP32 [n, H] = slope [n, V_local] @ head: this shard's part of the hidden states' gradient."""
    if direct(slope, head):
        if slope.is_cuda:
            return torch.mm(slope, head, out_dtype=torch.float32)
        return mkl.mm_(slope.new_empty(slope.shape[0], head.shape[1], dtype=torch.float32), slope, head)
    total = slope.new_zeros(slope.shape[0], head.shape[1])
    for rows, tile in _tiles(head):
        total.addmm_(slope[:, rows], tile)
    return total


def accumulate_head_gradient_(total: Tensor, slope: Tensor, hidden: Tensor) -> Tensor:
    """total [V_local, H] FP32 += slope [n, V_local]^T @ hidden [n, H]."""
    if direct(slope, hidden):
        if slope.is_cuda:
            return torch.addmm(total, slope.t(), hidden, out_dtype=torch.float32, out=total)
        return mkl.mm_(total, slope.t(), hidden, accumulate=True)
    return total.addmm_(slope.t(), hidden.float())
