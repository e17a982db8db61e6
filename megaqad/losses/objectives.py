"""What is minimized: each objective as local statistics, a merge, and a gradient for every local logit.

An `Objective` is a setting; `open` puts it to work on one chunk of tokens and gives an `Evaluation`, which the engine
in linear.py drives through the same three moves whatever the objective:

    local()    this rank's sums over its vocabulary columns      [K, n]
               -- one all-gather, done by the engine --
    merge()    the sums over the whole vocabulary, and the loss of each token
    gradient() d loss / d student logit for this rank's columns, from the merged sums; no communication
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaqad.losses import blocks, kl, reference
from megaqad.losses.kernels import Kernel

ELSEWHERE = -1
"""Column of a label that another rank's shard holds."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens' logits on this rank, FP32, at temperature 1."""

    student: Tensor
    """[n, V_local]"""
    teacher: Tensor | None
    """[n, V_local]"""
    labels: Tensor | None
    """int64 [n]: column within the shard, or ELSEWHERE"""


class Evaluation(ABC):
    """One objective on one chunk. After `merge`, `loss` is FP64 [n], the same on every rank."""

    loss: Tensor

    @abstractmethod
    def local(self) -> Tensor:
        """This shard's statistics [K, n]."""

    @abstractmethod
    def merge(self, gathered: Tensor) -> None:
        """Take the statistics of all ranks, [ranks, K, n]."""

    @abstractmethod
    def gradient(self, scale: Tensor, out: Tensor) -> None:
        """out [n, V_local] = scale[n] * d loss / d student logit; `out` may be the chunk's student logits."""


class Objective(ABC):
    """A function of student logits, and of teacher logits or labels."""

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        """Start on a chunk."""

    @abstractmethod
    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The definition, for reference.py: whole-vocabulary logits FP64 [n, V] and labels [n] -> loss [n]."""


@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s), both at `temperature`; see kl.py."""

    temperature: float = 1.0
    needs_teacher: ClassVar[bool] = True

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _ForwardKL(self, chunk, kernel)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        return reference.forward_kl(student, teacher, self.temperature)


class _ForwardKL(Evaluation):
    def __init__(self, objective: ForwardKL, chunk: Chunk, kernel: Kernel) -> None:
        assert chunk.teacher is not None
        self.student, self.teacher = chunk.student, chunk.teacher
        self.temperature, self.kernel = objective.temperature, kernel

    def local(self) -> Tensor:
        return self.kernel.statistics(self.student, self.teacher, temperature=self.temperature)

    def merge(self, gathered: Tensor) -> None:
        self.sums = kl.merge(gathered, self.temperature)
        self.loss = self.sums.token_kl

    def gradient(self, scale: Tensor, out: Tensor) -> None:
        factors = self.sums.factors(scale, self.temperature)
        self.kernel.gradient(
            self.student, self.teacher, peaks=self.sums.peaks, factors=factors, temperature=self.temperature, out=out
        )


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p_s(label) at temperature 1."""

    needs_labels: ClassVar[bool] = True

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _CrossEntropy(chunk, kernel)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return reference.cross_entropy(student, labels)


class _CrossEntropy(Evaluation):
    def __init__(self, chunk: Chunk, kernel: Kernel) -> None:
        assert chunk.labels is not None
        self.student, self.labels, self.kernel = chunk.student, chunk.labels, kernel

    def local(self) -> Tensor:
        statistics = self.kernel.statistics(self.student, None, temperature=1.0)
        return torch.cat([statistics, label_logits(self.student, self.labels).unsqueeze(0)])

    def merge(self, gathered: Tensor) -> None:
        peak, total, label = gathered.double().unbind(1)  # each [ranks, n]
        self.peak = peak.amax(0)
        self.total = (total * (peak - self.peak).exp()).sum(0)
        self.loss = self.total.log() + (self.peak - label.amax(0))

    def gradient(self, scale: Tensor, out: Tensor) -> None:
        peaks, factors = self.peak.float().unsqueeze(0), (scale / self.total).float().unsqueeze(0)
        self.kernel.gradient(self.student, None, peaks=peaks, factors=factors, temperature=1.0, out=out)
        here = torch.nonzero(self.labels != ELSEWHERE).squeeze(-1)
        out[here, self.labels[here]] -= scale[here].to(out.dtype)


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit where this rank holds it, else -1e30: [n, V_local], [n] -> FP64 [n]."""
    here = torch.nonzero(labels != ELSEWHERE).squeeze(-1)
    picked = torch.full(labels.shape, blocks.FLOOR, dtype=torch.float64, device=logits.device)
    picked[here] = logits[here, labels[here]].double().clamp(min=blocks.FLOOR)
    return picked
