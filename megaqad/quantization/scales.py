"""The scales of a layer's weight: refreshed as it trains, frozen at calibration, or learned (LSQ, arXiv 1902.08153).

A weight's scales follow from ``amax`` float32 [] and ``block_amax`` float32 [N, K / 16] (``nvfp4.quantize``)::

    s2 = amax / 2688                 exported as weight_scale_2
    b  = block_amax / (6 * s2)
    e  = E4M3(b)                     exported as weight_scale
    s  = e * s2                      y = w / s,  q = E2M1(y),  w_q = q * s

Refreshed, both are taken from the weight at every optimizer step. Frozen and learned, they are state of the layer,
cut over the tensor-parallel ranks as the weight is. Learned, they are parameters, in units of weights, so that one
learning rate suits both. With g the gradient of w_q, the gradients are

    dL/ds      = sum over the block of g * (q - y), and g * q where |y| > 6
    block_amax   dL/ds / 6
    amax         sum over all blocks of dL/ds * (e - b) / 2688

that is, LSQ's, straight through the rounding of E2M1 and of E4M3. Where E4M3 is clamped (b below 2^-10 or above 464, so
that rounding alone does not explain e), block_amax gets nothing and amax ``dL/ds * e / 2688``. Both are multiplied by
LSQ's 1 / sqrt(elements that share the scale * 6): Adam does not see it, the norm that gradients are clipped by does.
The weight's own gradient passes unchanged, as everywhere in this package.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaqad.nvfp4.calibration import Method
from megaqad.nvfp4.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX, E4M3_MIN_SUBNORMAL, global_scale_from_amax
from megaqad.nvfp4.reference import block_scales, decode_e2m1, encode_e2m1

E4M3_ROUNDS_FROM, E4M3_ROUNDS_UP_TO = E4M3_MIN_SUBNORMAL / 2, 464.0


@dataclass(frozen=True)
class Scaling:
    """How one layer's scales come about."""

    calibration: Method = "max"
    weight_scales: str = "refreshed"
    """``refreshed``, ``frozen`` or ``learned``."""
    activation_percentile: float = 100.0

    @property
    def stored(self) -> bool:
        """Whether the weight's scales are state of the layer."""
        return self.weight_scales != "refreshed"


DEFAULT_SCALING = Scaling()


class LearnedScales(torch.autograd.Function):
    """Forward: stand the quantized copy in for the weight. Backward: the gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, amax: Tensor, block_amax: Tensor, quantized: Tensor, dtype: torch.dtype, ranks: int
    ) -> Tensor:
        """
        Args:
            weight: [N, K] shard; ``amax`` float32 [1]; ``block_amax`` float32 [N, K / 16]; ``quantized``: of the three.
            dtype: that weights are rounded to before they are quantized.
            ranks: tensor-parallel ranks that hold a shard of this weight. Megatron-Core averages the gradient of
                ``amax`` over them (``average_gradients_across_tp_domain``): each gives its part that many times.
        """
        ctx.save_for_backward(weight, amax, block_amax)
        ctx.dtype, ctx.ranks = dtype, ranks
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, amax, block_amax = ctx.saved_tensors
        of_amax, of_blocks = scale_gradients(grads[0], weight.to(ctx.dtype), amax, block_amax, ctx.ranks)
        return grads[0], of_amax * ctx.ranks, of_blocks, None, None, None


def scale_gradients(
    gradient: Tensor, weight: Tensor, amax: Tensor, block_amax: Tensor, ranks: int = 1
) -> tuple[Tensor, Tensor]:
    """This rank's part of the gradient of ``amax`` [1] and the gradient of ``block_amax`` [N, K / 16], float32.

    Args:
        gradient: [N, K], of the quantized weight.
        weight: [N, K], as exported.
        ranks: that hold a shard; the whole weight has ``ranks * N * K`` elements.
    """
    global_scale = global_scale_from_amax(amax.reshape(()))
    ideal = block_amax / (E2M1_MAX * global_scale)
    e4m3 = block_scales(block_amax, global_scale).float()
    y = weight.float().unflatten(-1, (-1, BLOCK_SIZE)) / (e4m3 * global_scale).unsqueeze(-1)
    q = decode_e2m1(encode_e2m1(y))
    slope = torch.where(y.abs() <= E2M1_MAX, q - y, q)
    of_scales = (gradient.float().unflatten(-1, (-1, BLOCK_SIZE)) * slope).sum(-1)  # [N, K / 16]
    rounds = (ideal >= E4M3_ROUNDS_FROM) & (ideal <= E4M3_ROUNDS_UP_TO)
    of_blocks = torch.where(rounds, of_scales / E2M1_MAX, 0.0)
    of_amax = (of_scales * torch.where(rounds, e4m3 - ideal, e4m3)).sum() / (E2M1_MAX * E4M3_MAX)
    return (
        (of_amax / math.sqrt(ranks * weight.numel() * E2M1_MAX)).reshape(1),
        of_blocks / math.sqrt(BLOCK_SIZE * E2M1_MAX),
    )


BINS = 1 << 15
"""Non-negative BF16 numbers, NaN included."""


def count_magnitudes(x: Tensor) -> Tensor:
    """int64 [32768]: how many elements of ``x`` (any shape) have each BF16 number as magnitude, rounded up to it."""
    bits = x.detach().float().abs().view(torch.int32)
    return torch.bincount(((bits + 0xFFFF) >> 16).flatten().clamp_max(BINS - 1), minlength=BINS)


def percentile_of(counts: Tensor, percentile: float) -> Tensor:
    """float32 []: the smallest BF16 number that ``percentile`` per cent of the counted magnitudes do not exceed.

    Counts add up over ranks, and ranks that have counted the same input alike change nothing: the result does not
    depend on how the input was divided.
    """
    reached = counts.cumsum(0)
    wanted = -(-int(reached[-1]) * round(percentile * 10**6) // 10**8)
    index = torch.searchsorted(reached, wanted).to(torch.int32)
    return (index << 16).view(torch.float32)
