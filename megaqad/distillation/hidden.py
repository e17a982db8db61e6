"""The hidden-state loss: student and teacher compared after chosen layers, on whatever stage those layers are.

Megatron-Core's schedules ask for a loss on the last stage only. Here every stage has one of its own, and nothing
travels for it: the teacher's pass leaves the chosen layers' outputs on the ranks that computed them, and when the
student's layer runs on the same rank, the loss and its gradient are computed at once from its output. The gradient is
added to the output's in backward, which is all that a term of the loss does.

Scale: the main loss is a sum over tokens that Megatron divides once by the tokens of the global batch, and its backward
begins with 1 on the last stage. A term whose gradient is added unscaled elsewhere is divided by the same number. So the
loss trained is  sum_tokens main + weight * sum_layers sum_tokens hidden,  over the number of tokens.

Layers of models of different depth correspond by the share of the model that lies below them, rounded up; an even
division keeps both on one stage.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megaqad.data.batch import flatten_tokens
from megaqad.losses import hidden_cka, hidden_cosine
from megaqad.models.model import Model


def matching_layer(layer: int, student_layers: int, teacher_layers: int) -> int:
    """The teacher's layer that corresponds to the student's ``layer``; both counted from 0."""
    return -(-(layer + 1) * teacher_layers // student_layers) - 1


class _AddGradient(torch.autograd.Function):
    """Forward: the value itself. Backward: a given gradient is added to the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] + gradient, None


@dataclass
class _Pair:
    """One chosen layer on this rank."""

    teacher: list[Tensor] = field(default_factory=list)
    """[s(/tp), b, h_t] of each microbatch of the step"""
    seen: int = 0
    """Microbatches that the student's layer has seen."""


class HiddenLoss:
    """Watches chosen layers of one student and one teacher."""

    def __init__(
        self,
        student: Model,
        teacher: Model,
        *,
        weight: float,
        kind: str,
        layers: Sequence[int],
    ) -> None:
        """
        Args:
            student: bare, not in DDP.
            teacher: in the same layout.
            weight: of this loss beside the main one.
            kind: ``cosine`` (equal widths) or ``cka``.
            layers: the student's, counted from 0 over the whole model; none for all.
        """
        self._ranks, self._weight = student.ranks, weight
        self._loss = _cosine if kind == "cosine" else hidden_cka
        self._capturing = False
        self._token_weights: list[Tensor] = []
        self._values: list[Tensor] = []
        self._pairs: dict[int, _Pair] = defaultdict(_Pair)
        depths = student.architecture.num_layers, teacher.architecture.num_layers
        for index, layer in student.layers.items():
            if not layers or index in layers:
                partner = teacher.layers[matching_layer(index, *depths)]
                partner.register_forward_hook(self._capture(index))
                layer.register_forward_hook(self._compare(index))

    @contextmanager
    def captured(self) -> Iterator[None]:
        """What the teacher's layers give inside is kept for the coming step; forgets the last one."""
        self._pairs.clear()
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    @contextmanager
    def compared(self, token_weights: Sequence[Tensor]) -> Iterator[None]:
        """The student's passes inside are compared with what was captured.

        Args:
            token_weights: float32 [b, s] of every microbatch.
        """
        self._token_weights = [flatten_tokens(weights) for weights in token_weights]
        self._values.clear()
        try:
            yield
        finally:
            self._token_weights = []

    def value(self) -> Tensor:
        """float64 []: this stage's part of the trained loss, summed over the microbatches of the last step."""
        zero = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        return self._weight * sum((value.double() for value in self._values), zero)

    def _capture(self, index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, hidden: Tensor) -> None:
            if self._capturing:
                self._pairs[index].teacher.append(hidden)

        return hook

    def _compare(self, index: int) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, inputs: Any, hidden: Tensor) -> Tensor | None:
            # With recomputation a layer runs without gradients first; the run that counts comes in backward, which
            # visits a layer's microbatches in the order of forward.
            if not self._token_weights or not torch.is_grad_enabled():
                return None
            pair = self._pairs[index]
            gradient = self._gradient(hidden, pair.teacher[pair.seen], self._token_weights[pair.seen])
            pair.seen += 1
            added = _AddGradient.apply(hidden, gradient)
            whole: Tensor = make_viewless_tensor(inp=added, requires_grad=True, keep_graph=True)
            return whole

        return hook

    def _gradient(self, hidden: Tensor, teacher: Tensor, token_weights: Tensor) -> Tensor:
        """[s(/tp), b, h] in the student's dtype; notes the value. Collectives: those of the loss."""
        with torch.enable_grad():
            leaf = hidden.detach().flatten(0, 1).requires_grad_()
            loss = self._loss(
                leaf,
                teacher.flatten(0, 1),
                token_weights=token_weights,
                group=self._ranks.tensor_group if self._ranks.sizes.tensor > 1 else None,
                sequence_parallel=self._ranks.sizes.sequence,
            )
            (gradient,) = torch.autograd.grad(loss, leaf)
        self._values.append(loss.detach())
        return (self._weight * gradient).view_as(hidden)


def _cosine(student: Tensor, teacher: Tensor, **layout: Any) -> Tensor:
    return hidden_cosine(student, teacher, **layout)[0]
