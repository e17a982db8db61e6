"""What an objective is: local statistics, a merge, and a gradient for every local logit.

An `Objective` is a setting; `open` puts it to work on one chunk of tokens and gives an `Evaluation`, which the engine
in linear.py drives through the same moves whatever the objective:

    local()    this rank's sums over its vocabulary columns      [K, n]
               -- one all-gather, done by the engine --
    merge()    the sums over the whole vocabulary
               ... again if the objective needs another round ...
    loss       of each token, the same on every rank
    gradient() d loss / d student logit for this rank's columns, from the merged sums; no communication

Conventions shared by all: `temperature` T divides both models' logits and nothing multiplies the loss by T * T (do that
through the weight of a mixture if gradients should keep their size across temperatures); -inf logits have probability
0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megaqad.losses.kernels import Kernel

ELSEWHERE = -1
"""Column of a label that another rank's shard holds."""

ALL = slice(None)


@dataclass(frozen=True)
class Chunk:
    """Some tokens' logits on this rank, FP32, before any temperature."""

    student: Tensor
    """[n, V_local]"""
    teacher: Tensor | None
    """[n, V_local]"""
    labels: Tensor | None
    """int64 [n]: column within the shard, or ELSEWHERE"""


class Evaluation(ABC):
    """One objective on one chunk."""

    rounds: int = 1
    """How often `local` and `merge` alternate."""
    loss: Tensor
    """FP64 [n], the same on every rank; set by the last `merge`."""

    @abstractmethod
    def local(self) -> Tensor:
        """This shard's statistics for the coming merge, [K, n]."""

    @abstractmethod
    def merge(self, gathered: Tensor) -> None:
        """Take the statistics of all ranks, [ranks, K, n]."""

    @abstractmethod
    def gradient(self, rows: slice, scale: Tensor, out: Tensor) -> None:
        """out [rows, V_local] = scale [rows] * d loss / d student logit, for some of the chunk's tokens.

        `out` is FP32 or BF16, and may be the student logits of the same rows, or, with a kernel that works in order,
        BF16 in the first halves of the rows of either model's logits.
        """


class Objective(ABC):
    """A function of student logits, and of teacher logits or labels."""

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def open(self, chunk: Chunk, kernel: Kernel) -> Evaluation:
        """Start on a chunk."""

    @abstractmethod
    def dense(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The definition, for reference.py: whole-vocabulary logits FP64 [n, V] and labels [n] -> loss [n]."""
