"""A weighted sum of objectives over one set of logits: the parts' statistics travel in the same all-gathers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses import blocks
from megaqad.losses.kernels import Kernel
from megaqad.losses.objectives.base import Chunk, Evaluation, Objective
from megaqad.losses.objectives.cross_entropy import CrossEntropy
from megaqad.losses.objectives.divergences import ForwardKL, ReverseKL
from megaqad.losses.objectives.jensen_shannon import JensenShannon
from megaqad.losses.objectives.mean_squared import LogitMSE


@dataclass(frozen=True)
class Mixture(Objective):
    """sum_k weight_k * objective_k."""

    parts: tuple[tuple[float, Objective], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("an objective needs at least one part with a weight that is not 0")

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return any(part.needs_teacher for _, part in self.parts)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return any(part.needs_labels for _, part in self.parts)

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _Mixture(self, chunk, kernel)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        losses = [weight * part.dense(student, teacher, labels) for weight, part in self.parts]
        return torch.stack(losses).sum(0)


class _Mixture(Evaluation):
    def __init__(self, mixture: Mixture, chunk: Chunk, kernel: Kernel) -> None:
        self.student = chunk.student
        self.weights = [weight for weight, _ in mixture.parts]
        self.parts = [part.open(chunk, kernel) for _, part in mixture.parts]
        self.rounds = max(part.rounds for part in self.parts)
        self.done = 0

    def _unfinished(self) -> list[Evaluation]:
        return [part for part in self.parts if part.rounds > self.done]

    def local(self) -> Tensor:
        statistics = [part.local().double() for part in self._unfinished()]
        self.heights = [len(rows) for rows in statistics]
        return torch.cat(statistics)

    def merge(self, gathered: Tensor) -> None:
        for part, rows in zip(self._unfinished(), gathered.split(self.heights, dim=1), strict=True):
            part.merge(rows)
        self.done += 1
        if self.done == self.rounds:
            losses = [weight * part.loss for weight, part in zip(self.weights, self.parts, strict=True)]
            self.loss = torch.stack(losses).sum(0)

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        first = rows.indices(len(self.student))[0]
        for block in blocks.row_blocks(*out.shape):
            # every part reads the student's logits, which `out` may overlay: add up in scratch
            total, term = torch.zeros(2, *out[block].shape, dtype=torch.float32, device=out.device)
            here = slice(first + block.start, first + block.stop)
            for weight, part in zip(self.weights, self.parts, strict=True):
                part.gradient(here, weight * scale[block], out=term)
                total += term
            out[block] = total


def build(weights: Mapping[str, float], *, temperature: float = 1.0, beta: float = 0.5) -> Objective:
    """The objective for named weights, such as {"forward_kl": 0.9, "cross_entropy": 0.1}.

    Names: forward_kl, reverse_kl, jsd (with `beta`), logit_mse, all at `temperature`; cross_entropy. Parts of weight
    0 are left out; one part of weight 1 is that objective itself. Raises ValueError for an unknown name or if nothing
    is left.
    """
    known: dict[str, Objective] = {
        "forward_kl": ForwardKL(temperature),
        "reverse_kl": ReverseKL(temperature),
        "jsd": JensenShannon(beta, temperature),
        "logit_mse": LogitMSE(temperature),
        "cross_entropy": CrossEntropy(),
    }
    for name in weights:
        if name not in known:
            raise ValueError(f"objective {name!r} does not exist; choose among {', '.join(known)}")
    parts = tuple((weight, known[name]) for name, weight in weights.items() if weight != 0)
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Mixture(parts)
