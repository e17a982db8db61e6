"""Several linear layers of one shape as one module: the experts of one rank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaqad.models.weights import Weight

if TYPE_CHECKING:
    from megaqad.models.blocks.block import Builder


class GroupedLinear(nn.Module):
    """Several linear layers of one shape, each on rows of its own.

    The weight [e, out, in] is this rank's share: outputs or inputs divided over the tensor-parallel ranks. No
    collectives: the sums over divided inputs are left to the caller.
    """

    def __init__(self, weights: Sequence[Weight], builder: "Builder") -> None:
        """``weights``: of this rank's experts."""
        super().__init__()
        config, ranks = builder.config, builder.ranks
        boxes = [part.box(ranks.tensor_rank, ranks.sizes.tensor) for part in weights[0].parts]
        rows, columns = (sum(box[0][1] - box[0][0] for box in boxes), boxes[0][1][1] - boxes[0][1][0])
        self.weight = nn.Parameter(
            torch.empty(len(weights), rows, columns, dtype=config.params_dtype, device=builder.device)
        )
        # Megatron-Core keeps and reduces the gradients of such parameters over the ranks that have copies of them.
        self.weight.allreduce = ranks.sizes.expert == 1  # type: ignore[attr-defined]
        if config.perform_initialization:
            from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

            init = config.output_layer_init_method if weights[0].row_parallel else config.init_method
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init(self.weight)

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """[t, in(/tp)], the first ``counts[0]`` rows for the first expert and so on -> [t, out(/tp)]."""
        return grouped_product(rows, self.weight, counts)


def grouped_product(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Rows [t, k], by expert, times weights [e, n, k] -> [t, n]; one gradient for the whole weight."""
    output: Tensor = _GroupedProduct.apply(rows, weight, counts)
    return output


class _GroupedProduct(torch.autograd.Function):
    """One expert after the other; on CUDA in BF16 PyTorch's grouped product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return _products(rows, weight.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        (slope,) = grads
        of_rows = _products(slope.contiguous(), weight, ctx.counts) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _outer_products(slope, rows, ctx.counts)
        return of_rows, of_weight, None


def _grouped_on_device(rows: Tensor) -> bool:
    """Whether PyTorch's grouped product can do it: one launch for all experts."""
    return rows.is_cuda and rows.dtype is torch.bfloat16 and rows.shape[0] > 0


def _ends(rows: Tensor, counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)


def _outer_products(slope: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
    """Slope [t, n] and rows [t, k], by expert -> the weights' gradients [e, n, k]."""
    if _grouped_on_device(rows):
        grouped: Tensor = torch._grouped_mm(slope.contiguous().t(), rows, offs=_ends(rows, counts))
        return grouped
    gradients = rows.new_empty(len(counts), slope.shape[1], rows.shape[1])
    for gradient, above, below in zip(gradients, slope.split(counts), rows.split(counts), strict=True):
        torch.mm(above.t(), below, out=gradient)
    return gradients


def _products(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """Rows [t, k], by expert, times matrices [e, k, n] -> [t, n]."""
    if _grouped_on_device(rows):
        grouped: Tensor = torch._grouped_mm(rows, matrices, offs=_ends(rows, counts))
        return grouped
    output = rows.new_empty(rows.shape[0], matrices.shape[2])
    for product, part, matrix in zip(output.split(counts), rows.split(counts), matrices, strict=True):
        torch.mm(part, matrix, out=product)
    return output
