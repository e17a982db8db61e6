"""The four matrix products of a head and its gradient, with FP32 results from BF16 operands.

Why FP32 results: rounding a logit of 16 to BF16 moves it by up to 0.06, which is as large as the difference between a
student and its teacher late in distillation; the KL gradient is then 20-70 % noise. An accumulator is FP32 anyway, so
keeping its result costs memory for one chunk and nothing else.

On CUDA cuBLAS writes FP32 results directly. On a CPU with AMX products.py does. Elsewhere the head is widened to FP32 a
few thousand rows at a time: with AMX that would take four to five times as long, without it BF16 has no advantage. All
functions are local: `head` [V_local, H] is this rank's shard.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megaqad.losses import products

_TILE_ELEMENTS = 1 << 22
_LINE = 16
"""FP32 numbers in a cache line of 64 bytes."""


def direct(hidden: Tensor, head: Tensor) -> bool:
    """Whether one library call gives the FP32 product of these BF16 operands.

    Then the gradient of the logits is wanted in BF16 too: rounding it once costs 2^-9 of each entry, as rounding the
    results to BF16 parameters' gradients does.
    """
    if hidden.dtype != torch.bfloat16 or head.dtype != torch.bfloat16:
        return False
    return head.is_cuda or (head.device.type == "cpu" and products.serves(head.shape[1]))


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


def logit_buffers(models: int, tokens: int, head: Tensor) -> Tensor:
    """Uninitialized FP32 [models, tokens, V_local]. Rows begin with a cache line, as `products` likes them."""
    whole_lines = -(-len(head) // _LINE) * _LINE
    return head.new_empty(models, tokens, whole_lines, dtype=torch.float32)[..., : len(head)]


def logits_(out: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """out [n, V_local] FP32 = hidden [n, H] @ head^T."""
    if direct(hidden, head):
        if out.is_cuda:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32, out=out)
        return products.logits_(out, hidden, head)
    hidden = hidden.float()
    for rows, tile in _tiles(head):
        torch.mm(hidden, tile.t(), out=out[:, rows])
    return out


def hidden_gradient(slope: Tensor, head: Tensor) -> Tensor:
    """FP32 [n, H] = slope [n, V_local] @ head: this shard's part of the hidden states' gradient."""
    if slope.dtype == torch.bfloat16:
        if slope.is_cuda:
            return torch.mm(slope, head, out_dtype=torch.float32)
        return products.hidden_gradient(slope, head)
    total = slope.new_zeros(slope.shape[0], head.shape[1])
    for rows, tile in _tiles(head):
        total.addmm_(slope[:, rows], tile)
    return total


def head_gradient(total: Tensor | None, slope: Tensor, hidden: Tensor) -> Tensor:
    """FP32 [V_local, H] = slope [n, V_local]^T @ hidden [n, H], added to `total` if there is one."""
    if slope.dtype == torch.bfloat16 and not slope.is_cuda:
        return products.head_gradient(total, slope, hidden)
    if slope.dtype == torch.bfloat16:
        if total is None:
            return torch.mm(slope.t(), hidden, out_dtype=torch.float32)
        return torch.addmm(total, slope.t(), hidden, out_dtype=torch.float32, out=total)
    return torch.mm(slope.t(), hidden.float()) if total is None else total.addmm_(slope.t(), hidden.float())
