"""Cross entropy with labels: the objective of plain fine-tuning, alone or beside a divergence."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaqad.losses import blocks, reference
from megaqad.losses.kernels import Kernel
from megaqad.losses.objectives.base import ELSEWHERE, Chunk, Evaluation, Objective


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p_s(label), always at temperature 1. Gradient p_s - [v == label]."""

    needs_teacher: ClassVar[bool] = False
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
        self.label = label.amax(0)
        self.loss = self.total.log() + (self.peak - self.label)

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        peaks, factors = self.peak[rows].float().unsqueeze(0), (scale / self.total[rows]).float().unsqueeze(0)
        self.kernel.gradient(self.student[rows], None, peaks=peaks, factors=factors, temperature=1.0, out=out)
        # set, not subtracted from what may be rounded to BF16 already: near 1, p - 1 would lose all its digits
        if out.shape[1] == 0:
            return
        labels = self.labels[rows].unsqueeze(-1)
        log_probability = self.label[rows] - self.peak[rows] - self.total[rows].log()
        value = (scale * log_probability.expm1()).to(out.dtype).unsqueeze(-1)
        place = labels.clamp(min=0)
        out.scatter_(1, place, torch.where(labels == ELSEWHERE, out.gather(1, place), value))


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit where this rank holds it, else -1e30: [n, V_local], [n] -> FP64 [n]."""
    if logits.shape[1] == 0:
        return torch.full(labels.shape, blocks.FLOOR, dtype=torch.float64, device=logits.device)
    picked = logits.gather(1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).double().clamp(min=blocks.FLOOR)
    return torch.where(labels == ELSEWHERE, blocks.FLOOR, picked)
