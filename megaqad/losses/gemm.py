"""The four matrix products of a head and its gradient, with FP32 results from BF16 operands.

Why FP32 results: rounding a logit of 16 to BF16 moves it by up to 0.06, which is as large as the difference between a
student and its teacher late in distillation; the KL gradient is then 20-70 % noise. An accumulator is FP32 anyway, so
keeping its result costs memory for one chunk and nothing else.

On CUDA cuBLAS writes FP32 results directly. PyTorch's CPU products cannot, so the head is widened to FP32 a few
thousand rows at a time. All functions are local: `head` [V_local, H] is this rank's shard.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_TILE_ELEMENTS = 1 << 22


def _direct(head: Tensor, other: Tensor) -> bool:
    """Whether one library call gives the FP32 result."""
    return head.dtype == other.dtype and (head.dtype == torch.float32 or head.is_cuda)


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
    if _direct(head, hidden) and head.dtype != torch.float32:
        return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
    hidden = hidden.float()
    for rows, tile in _tiles(head):
        torch.mm(hidden, tile.t(), out=out[:, rows])
    return out


def hidden_gradient(logit_gradient: Tensor, head: Tensor) -> Tensor:
    """FP32 [n, H] = logit_gradient [n, V_local] @ head: this shard's part of the hidden states' gradient."""
    if head.is_cuda and head.dtype != torch.float32:
        return torch.mm(logit_gradient.to(head.dtype), head, out_dtype=torch.float32)
    total = logit_gradient.new_zeros(logit_gradient.shape[0], head.shape[1])
    for rows, tile in _tiles(head):
        total.addmm_(logit_gradient[:, rows], tile)
    return total


def accumulate_head_gradient_(total: Tensor, logit_gradient: Tensor, hidden: Tensor) -> Tensor:
    """total [V_local, H] FP32 += logit_gradient [n, V_local]^T @ hidden [n, H]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        narrow = logit_gradient.to(hidden.dtype)
        return torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total)
    return total.addmm_(logit_gradient.t(), hidden.float())
