"""The straight-through estimator: rounded values forward, the gradient unchanged backward."""

from typing import Any, cast

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Forward: stand the values in for the tensor. Backward: their gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, values: Tensor) -> Tensor:
    """``values``, of the shape and dtype of ``x``, with their gradient handed to ``x``; nothing is saved for it."""
    return cast(Tensor, _StraightThrough.apply(x, values))
