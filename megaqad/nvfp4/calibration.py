"""How the scales of a weight are chosen: which amax stands for the tensor, and which for each block.

``quantize`` derives every scale from an amax: ``amax / 2688`` is the global scale, and the E4M3 number nearest to
``block_amax / (6 * global_scale)`` the block's. A method only says which numbers to put there:

    max             the largest magnitudes themselves. Nothing is clipped (but for the rounding of the scale).
    mse             the tensor's own amax; for each block, of all 126 positive E4M3 scales, the one with the least
                    squared error in float32, the smaller of two that are equal. ModelOpt's "mse" with its FP8 sweep.
    four_over_six   the tensor's amax times 448/256, which leaves room for block scales half as large again; for each
                    block, whether its largest magnitude becomes a 6 or a 4, by the squared error, 6 when equal. E2M1
                    has nothing between 4 and 6: a block with several large values rounds better below 4
                    (arXiv 2512.02010).

A block of zeros has amax 0 under every method, which ``quantize`` reads as scale 1.

The fast sweep tries 24 scales, not 126. A scale above a third of the block's amax loses to its half, whose grid holds
all its values up to that amax; one below 0.35 of the max rule's clips the largest element by more than 16 rounding
errors. Both leave at most 14 codes below the max rule's and 9 above. E4M3's subnormals have no halves: those blocks
are searched from the smallest scale on.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megaqad.nvfp4 import reference
from megaqad.nvfp4.api import Impl, implementation
from megaqad.nvfp4.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, check_quantizable, global_scale_from_amax
from megaqad.nvfp4.vectorized import block_maxima

Method = Literal["max", "mse", "four_over_six"]
METHODS: tuple[Method, ...] = ("max", "mse", "four_over_six")

FOUR_OVER_SIX_E4M3_MAX = 256.0
"""Largest block scale of a block mapped to 6; 384 when mapped to 4, still below E4M3's 448."""
LARGEST_CODE = 126
_BELOW, _CANDIDATES = 14, 24
_SUBNORMAL_CODES, _SUBNORMAL_CANDIDATES = 16, 40

Errors = Callable[[Tensor, Tensor], Tensor]
"""``Implementation.squared_errors``."""


@torch.no_grad()
def choose_scales(x: Tensor, amax: Tensor, method: Method, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The ``amax`` and ``block_amax`` that ``quantize`` is to take for ``x``.

    Args:
        x: [..., K] in the dtype that is exported.
        amax: float32 [], largest magnitude of the whole tensor: over its shards and what engines fuse with it.
        impl: ``reference`` for the readable form; the same numbers. Triton has no kernel for it and does as ``torch``.

    Returns:
        float32 [] and float32 [..., K // 16]. Blocks do not see each other: under a common ``amax`` the result of a
        shard is the shard of the result.
    """
    check_quantizable(x, amax)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    blocks = x.detach().contiguous().view(-1, BLOCK_SIZE)  # [B, 16]
    largest = block_maxima(blocks)
    errors = implementation(impl, x.device).squared_errors
    if method == "four_over_six":
        amax = amax * (E4M3_MAX / FOUR_OVER_SIX_E4M3_MAX)
        block_amax = _four_or_six(blocks, largest, amax, errors)
    elif method == "mse":
        block_amax = _sweep_all(blocks, amax) if impl == "reference" else _sweep(blocks, largest, amax, errors)
    else:
        block_amax = largest
    block_amax = torch.where(largest == 0, 0.0, block_amax)
    return amax, block_amax.view(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)


def _e4m3_value(codes: Tensor) -> Tensor:
    """Codes int64 [B] of E4M3 as float32 [B]."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def _four_or_six(blocks: Tensor, largest: Tensor, amax: Tensor, errors: Errors) -> Tensor:
    global_scale = global_scale_from_amax(amax)
    six, four = (
        errors(blocks, reference.block_scales(block_amax, global_scale).float() * global_scale)
        for block_amax in (largest, largest * 1.5)
    )
    return torch.where(four < six, largest * 1.5, largest)


def _sweep(blocks: Tensor, largest: Tensor, amax: Tensor, errors: Errors) -> Tensor:
    global_scale = global_scale_from_amax(amax)
    code = reference.block_scales(largest, global_scale).view(torch.uint8).long()
    best = _search(blocks, global_scale, code - _BELOW, _CANDIDATES, errors)
    small = (code < _SUBNORMAL_CODES).nonzero().squeeze(-1)
    if len(small):
        best[small] = _search(blocks[small], global_scale, torch.ones_like(small), _SUBNORMAL_CANDIDATES, errors)
    return _e4m3_value(best) * (E2M1_MAX * global_scale)


def _search(blocks: Tensor, global_scale: Tensor, first: Tensor, count: int, errors: Errors) -> Tensor:
    """The E4M3 code of the least error among ``count`` from ``first`` int64 [B] on; the smaller of equal ones."""
    best, least = first.clamp(1, LARGEST_CODE), torch.full_like(blocks[:, 0], torch.inf, dtype=torch.float32)
    for offset in range(count):
        codes = (first + offset).clamp(1, LARGEST_CODE)
        found = errors(blocks, _e4m3_value(codes) * global_scale)
        better = found < least
        best, least = torch.where(better, codes, best), torch.where(better, found, least)
    return best


def _sweep_all(blocks: Tensor, amax: Tensor) -> Tensor:
    """The definition of ``mse``: every scale there is."""
    global_scale = global_scale_from_amax(amax)
    candidates = _e4m3_value(torch.arange(1, LARGEST_CODE + 1, device=blocks.device))  # [126]
    errors = [reference.squared_errors(blocks, scale.expand(len(blocks))) for scale in candidates * global_scale]
    return candidates[torch.stack(errors).argmin(0)] * (E2M1_MAX * global_scale)
