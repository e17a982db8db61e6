"""Mean squared difference of logits: sum_v (a_v - b_v)^2 / V, a and b the logits over the temperature.

Columns where either model has -inf (padding) take no part in sum or mean. Unlike the divergences it sees an offset that
is common to all logits of one model, which no probability does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses import blocks, kl, reference
from megaqad.losses.kernels import Kernel
from megaqad.losses.objectives.base import ALL, Chunk, Evaluation, Objective


@dataclass(frozen=True)
class LogitMSE(Objective):
    """Mean over the vocabulary of the squared difference of the logits."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        kl.check_temperature(self.temperature)

    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        return _LogitMSE(self, chunk)

    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        assert teacher is not None
        return reference.logit_mse(student, teacher, self.temperature)


class _LogitMSE(Evaluation):
    def __init__(self, objective: LogitMSE, chunk: Chunk) -> None:
        assert chunk.teacher is not None
        self.student, self.teacher, self.temperature = chunk.student, chunk.teacher, objective.temperature

    def local(self) -> Tensor:
        result = torch.zeros(2, len(self.student), dtype=torch.float64, device=self.student.device)
        for block, difference, counted in self._differences(ALL):
            result[0, block] = blocks.blocked_sum(difference.square_())
            result[1, block] = counted.sum(-1).double()
        return result

    def merge(self, gathered: Tensor) -> None:
        squares, self.count = gathered.double().sum(0)
        self.loss = squares / self.count

    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        factor = (2 * scale / (self.temperature * self.count[rows])).float()
        for block, difference, _ in self._differences(rows):
            out[block] = difference.mul_(factor[block].unsqueeze(-1))

    def _differences(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Block by block: a - b, 0 where not counted, in FP32 scratch, and which columns count [block, V_local]."""
        student, teacher = self.student[rows], self.teacher[rows]
        for block in blocks.row_blocks(*student.shape):
            padding = (student[block] <= blocks.FLOOR) | (teacher[block] <= blocks.FLOOR)
            difference = (student[block].float() - teacher[block].float()).masked_fill_(padding, 0.0)
            yield block, difference.div_(self.temperature), ~padding
