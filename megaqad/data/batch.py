"""The one type of batch, from the source of tokens to the loss."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megaqad.losses.inputs import Work


@dataclass(frozen=True)
class Batch:
    """Some sequences of one data-parallel rank, the same on its tensor-parallel and pipeline ranks."""

    tokens: Tensor
    """int64 [b, s]."""
    labels: Tensor
    """int64 [b, s], the token after each; vocabulary ids."""
    weights: Tensor
    """float32 [b, s], how much each label counts in the loss; 0 leaves it out."""
    teacher_hidden: Tensor | None = None
    """[s(/tp), b, h], the teacher's last hidden states; on the last stage of a distillation step."""
    work: "Work | None" = None
    """Which tokens the loss looks at; on the last stage of a step."""

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self, tokens=self.tokens.to(device), labels=self.labels.to(device), weights=self.weights.to(device)
        )


def flatten_tokens(values: Tensor) -> Tensor:
    """[b, s] per-token values -> [s * b], the order in which hidden states [s, b, h] are flattened."""
    return values.transpose(0, 1).reshape(-1)
