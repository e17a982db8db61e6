"""Generalized Jensen-Shannon divergence between teacher and student.

With the mixture m = beta p_t + (1 - beta) p_s (Agarwal et al., arXiv 2306.13649, eq. 1):

    JSD = beta KL(p_t || m) + (1 - beta) KL(p_s || m)
    dJSD / dz_s = (1 - beta) / T * p_s [log(p_s / m) - KL(p_s || m)]

The mixture needs normalized probabilities, so there are two rounds: the normalizers, then the two KLs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses import blocks, kl, reference
from megaqad.losses.kernels import Kernel
from megaqad.losses.objectives.base import ALL, Chunk, Evaluation, Objective

_LARGEST_RATIO = 80.0
"""e^80 is still finite in FP32; beyond it the smaller probability contributes nothing."""


@dataclass(frozen=True)
class JensenShannon(Objective):
    """beta near 0 behaves like forward KL, near 1 like reverse KL (both scaled); 0.5 is symmetric."""

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        kl.check_temperature(self.temperature)
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta={self.beta} must lie between 0 and 1; use forward_kl or reverse_kl for the ends")

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _JensenShannon(self, chunk, kernel)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        return reference.generalized_jsd(student, teacher, self.temperature, self.beta)


class _JensenShannon(Evaluation):
    rounds = 2

    def __init__(self, objective: JensenShannon, chunk: Chunk, kernel: Kernel) -> None:
        assert chunk.teacher is not None
        self.student, self.teacher = chunk.student, chunk.teacher
        self.objective, self.kernel = objective, kernel
        self.sums: blocks.KLSums | None = None

    def local(self) -> Tensor:
        if self.sums is None:
            return self.kernel.statistics(self.student, self.teacher, temperature=self.objective.temperature)
        beta = self.objective.beta
        result = torch.zeros(2, len(self.student), dtype=torch.float64, device=self.student.device)
        for block, p_s, p_t, ratio in self._probabilities(ALL):
            over_student = _log_over_mixture(ratio, beta)
            over_teacher = _log_over_mixture(ratio.neg_(), 1 - beta)
            result[0, block] = blocks.blocked_sum(p_t.mul_(over_teacher))
            result[1, block] = blocks.blocked_sum(p_s.mul_(over_student))
        return result

    def merge(self, gathered: Tensor) -> None:
        if self.sums is None:
            self.sums = self.kernel.merge(gathered, temperature=self.objective.temperature)
            return
        of_teacher, self.of_student = gathered.double().sum(0)
        self.loss = self.objective.beta * of_teacher + (1 - self.objective.beta) * self.of_student

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        factor = (scale * (1 - self.objective.beta) / self.objective.temperature).float()
        of_student = self.of_student[rows].float()
        for block, p_s, _, ratio in self._probabilities(rows):
            excess = _log_over_mixture(ratio, self.objective.beta).sub_(of_student[block].unsqueeze(-1))
            out[block] = p_s.mul_(factor[block].unsqueeze(-1)).mul_(excess)

    def _probabilities(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Block by block: p_s, p_t and log(p_t / p_s) in FP32 scratch [block, V_local] that may be overwritten."""
        assert self.sums is not None
        temperature = self.objective.temperature
        student, teacher = self.student[rows], self.teacher[rows]
        peaks, log_sums = self.sums.peaks[:, rows], self.sums.sums[:, rows].log()
        # before normalization the two differ by little where the models do; log p itself is ten times as large
        log_sum_difference = (log_sums[0] - log_sums[1]).float().unsqueeze(-1)
        scales = log_sums.neg().exp().float().unsqueeze(-1)
        for block in blocks.row_blocks(*student.shape):
            d_s, d_t = torch.empty(2, *student[block].shape, dtype=torch.float32, device=student.device)
            blocks.shifted(student[block], peaks[0, block], temperature, out=d_s)
            blocks.shifted(teacher[block], peaks[1, block], temperature, out=d_t)
            ratio = torch.sub(d_t, d_s).add_(log_sum_difference[block]).clamp_(-_LARGEST_RATIO, _LARGEST_RATIO)
            yield block, d_s.exp_().mul_(scales[0, block]), d_t.exp_().mul_(scales[1, block]), ratio


def _log_over_mixture(ratio: Tensor, weight: float) -> Tensor:
    """log(p / m) where m = (1 - weight) p + weight q and ratio = log(q / p); exact to rounding for q close to p."""
    return ratio.expm1().mul_(weight).log1p_().neg_()
