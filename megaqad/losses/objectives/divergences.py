"""Forward and reverse KL, from the same five statistics with the models' roles exchanged (see kl.py and blocks.py)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses import blocks, kl, reference
from megaqad.losses.kernels import Kernel
from megaqad.losses.objectives.base import Chunk, Evaluation, Objective


@dataclass(frozen=True)
class ForwardKL(Objective):
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s): the student must cover all that the teacher would say."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        kl.check_temperature(self.temperature)

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
        self.sums = self.kernel.merge(gathered, temperature=self.temperature)
        self.loss = self.sums.token_kl

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        self.kernel.gradient(
            self.student[rows],
            self.teacher[rows],
            peaks=self.sums.peaks[:, rows],
            factors=kl.factors(self.sums.sums[:, rows], scale, self.temperature),
            temperature=self.temperature,
            out=out,
        )


@dataclass(frozen=True)
class ReverseKL(Objective):
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t): the student may say only what the teacher would.

    Gradient p_s (log p_s - log p_t - KL) / T.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        kl.check_temperature(self.temperature)

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _ReverseKL(self, chunk, kernel)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        return reference.forward_kl(teacher, student, self.temperature)


class _ReverseKL(Evaluation):
    def __init__(self, objective: ReverseKL, chunk: Chunk, kernel: Kernel) -> None:
        assert chunk.teacher is not None
        self.student, self.teacher = chunk.student, chunk.teacher
        self.temperature, self.kernel = objective.temperature, kernel

    def local(self) -> Tensor:
        return self.kernel.statistics(self.teacher, self.student, temperature=self.temperature)

    def merge(self, gathered: Tensor) -> None:
        sums = self.kernel.merge(gathered, temperature=self.temperature)  # row 0 is the teacher here, row 1 the student
        self.loss, self.peaks = sums.token_kl, sums.peaks
        sum_t, self.sum_s = sums.sums
        self.offset = (sum_t.log() - self.sum_s.log() - self.loss).float()

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        factor = (scale / (self.temperature * self.sum_s[rows])).float()
        for block in blocks.row_blocks(*out.shape):
            student, teacher = self.student[rows][block], self.teacher[rows][block]
            peak_t, peak_s = self.peaks[:, rows][:, block]
            d_s, d_t = torch.empty(2, *student.shape, dtype=torch.float32, device=out.device)
            blocks.shifted(student, peak_s, self.temperature, out=d_s)
            blocks.shifted(teacher, peak_t, self.temperature, out=d_t)
            excess = d_t.neg_().add_(d_s).add_(self.offset[rows][block].unsqueeze(-1))
            out[block] = d_s.exp_().mul_(factor[block].unsqueeze(-1)).mul_(excess)
