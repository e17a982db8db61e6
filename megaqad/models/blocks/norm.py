"""RMSNorm, in the orders of operations that the families of transformers have.

Megatron's own local norm refuses sequence parallelism. This one marks its weight ``sequence_parallel``, by which
Megatron knows that the weight's gradient must be summed over the tensor-parallel ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaqad.models.blocks.block import Builder
from megaqad.models.operations import Order, weighted
from megaqad.models.weights import WHOLE, Cut, HfTensor, Weight


@dataclass(frozen=True)
class Norm:
    """One RMSNorm: y = weight * x / sqrt(mean(x^2) + eps) over the last dim."""

    module: str
    """Its Hugging Face name."""
    size: int
    eps: float
    order: Order = "cast_first"
    cut: Cut = WHOLE
    """Of a norm over all heads together, whose statistic then takes all tensor-parallel ranks."""

    def weight(self, name: str) -> Weight:
        return Weight(f"{name}.weight", (HfTensor(f"{self.module}.weight", (self.size,), self.cut),))

    def build(self, builder: Builder) -> "RMSNorm":
        return RMSNorm(self, builder)


class RMSNorm(nn.Module):
    """Input and output [.., size] in any sharding of the leading dims; statistics in FP32.

    The weight [size] is replicated, or cut with the last dim; then forward and backward take one all-reduce of a number
    per token over the tensor-parallel group.
    """

    def __init__(self, norm: Norm, builder: Builder) -> None:
        super().__init__()
        ((start, stop),) = norm.weight("").parts[0].box(builder.ranks.tensor_rank, builder.ranks.sizes.tensor)
        self.eps, self.order, self.size = norm.eps, norm.order, norm.size
        self.operations = builder.operations
        self.group = builder.ranks.tensor_group if norm.cut.dim is not None and stop - start < norm.size else None
        self.weight = nn.Parameter(torch.ones(stop - start, dtype=builder.config.params_dtype, device=builder.device))
        if norm.order == "centred" and builder.config.perform_initialization:
            nn.init.zeros_(self.weight)
        if norm.cut.dim is None:
            self.weight.sequence_parallel = builder.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self.operations.rms_norm(x, self.weight, self.eps, self.order)
        wide = x.float()
        counted = x.shape[-1] * self.group.size()  # heads that ranks share are in the sum as often as here
        mean = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.group) / counted
        return weighted(wide * torch.rsqrt(mean + self.eps), self.weight, self.order, x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Forward and backward: all-reduce (sum). Each rank continues with the same sum, so the gradients of all count."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)  # type: ignore[attr-defined]
        return total, None
