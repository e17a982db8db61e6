"""KL to the teacher, cross entropies and top-1 agreement over held-out text, all from FP32 logits.

BF16 logits would bias a small KL by up to a third, so hidden states travel and logits are made chunk by chunk in
FP32 (``losses.compare_heads``). Sums are kept in FP64. The numbers are means over the same tokens for every student,
whatever the layout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.data import TokenDataset
from megaqad.data.batch import Batch, flatten_tokens
from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.teachers import LiveTeacher, Teacher
from megaqad.errors import UserError
from megaqad.losses import compare_heads
from megaqad.models.causal_lm import CausalLM
from megaqad.models.model import Model

BATCHES_AT_ONCE = 8
"""Microbatches whose hidden states are held together; enough to fill a pipeline."""
KEPT_BYTES_MOST = 1 << 30
"""Of the teacher's hidden states, which are the same for every student; beyond it they are computed again."""


@dataclass(frozen=True)
class Evaluation:
    """Means over ``tokens`` held-out tokens; KL and cross entropies in nats per token."""

    kl_to_teacher: float
    cross_entropy: float
    teacher_cross_entropy: float
    top1_agreement: float
    tokens: int

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"KL to the teacher {self.kl_to_teacher:.5f}, cross entropy {self.cross_entropy:.4f} "
            f"(teacher {self.teacher_cross_entropy:.4f}), top-1 agreement {self.top1_agreement:.2%}, "
            f"{self.tokens:,} tokens"
        )


class Evaluator:
    """Measures students against one teacher on one set of held-out tokens."""

    def __init__(
        self,
        teacher: Teacher,
        data: TokenDataset,
        *,
        max_tokens: int,
        micro_batch_size: int,
    ) -> None:
        """
        Args:
            teacher: with a model: one that keeps its hidden states of other tokens is of no use.
            max_tokens: held-out tokens to use; fewer when the data has fewer.
        """
        assert teacher.model is not None, "evaluation runs the teacher on held-out tokens"
        self._teacher, self._original = teacher, teacher.model
        self._ranks = ranks = teacher.model.ranks
        self._batches = data.evaluation_batches(micro_batch_size, ranks.data_rank, ranks.data_size, max_tokens)
        tokens = sum(batch.tokens.numel() for batch in self._batches)
        per_token = teacher.model.architecture.hidden_size * teacher.model.dtype.itemsize
        self._keeps = tokens * per_token <= KEPT_BYTES_MOST
        self._kept: dict[int, list[Tensor]] = {}

    @property
    def groups_of_batches(self) -> int:
        """How often ``evaluate`` reports progress."""
        return -(-len(self._batches) // BATCHES_AT_ONCE)

    @torch.no_grad()
    def evaluate(self, student: Model, advance: Callable[[], None] = lambda: None) -> Evaluation:
        """The same ``Evaluation`` on every rank.

        Args:
            student: in the teacher's layout. The model of a ``LiveTeacher`` gives the column of the original; the
                teacher must not have changed since the first call.
            advance: called after every group of batches.

        Collectives: a forward pass of the student and, the first time, of the teacher, those of ``compare_heads``, one
        sum over data-parallel ranks, one broadcast from the last stage.

        Raises:
            UserError: the teacher's cross entropy is NaN or Inf, on every rank.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self._ranks.device)
        for first in range(0, len(self._batches), BATCHES_AT_ONCE):
            batches = self._batches[first : first + BATCHES_AT_ONCE]
            tokens = [batch.tokens.to(self._ranks.device) for batch in batches]
            teacher_hidden = self._teacher_hidden(first, tokens)
            is_teacher = isinstance(self._teacher, LiveTeacher) and student is self._original
            student_hidden = teacher_hidden if is_teacher else forward_hidden(student, tokens)
            for batch, ours, theirs in zip(batches, student_hidden, teacher_hidden, strict=False):
                sums += self._sums(batch, student.last, ours, theirs)
            advance()
        if self._ranks.is_last_stage:
            dist.all_reduce(sums, group=self._ranks.data_group)
        if self._ranks.sizes.pipeline > 1:
            dist.broadcast(sums, self._ranks.last_stage_rank, group=self._ranks.pipeline_group)
        kl, student_ce, teacher_ce, agreement, tokens_seen = sums.tolist()
        if not math.isfinite(teacher_ce):
            raise UserError(
                f"the teacher's cross entropy over held-out tokens is {teacher_ce}: look at its checkpoint, whose "
                "weights are not finite or give logits that are not"
            )
        return Evaluation(
            kl_to_teacher=kl / tokens_seen,
            cross_entropy=student_ce / tokens_seen,
            teacher_cross_entropy=teacher_ce / tokens_seen,
            top1_agreement=agreement / tokens_seen,
            tokens=int(tokens_seen),
        )

    def _teacher_hidden(self, first: int, tokens: list[Tensor]) -> list[Tensor]:
        """The teacher's last hidden states of the microbatches from ``first`` on, from an earlier call if kept."""
        hidden = self._kept.get(first)
        if hidden is None:
            hidden = self._teacher.last_hidden(tokens)
            if self._keeps:
                self._kept[first] = hidden
        return hidden

    def _sums(self, batch: Batch, student: CausalLM, student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        """float64 [5]: KL, student and teacher cross entropy, agreements, tokens of one microbatch."""
        weights = flatten_tokens(batch.weights.to(self._ranks.device))
        metrics = compare_heads(
            student_hidden.flatten(0, 1),
            student.head_weight(),
            teacher_hidden.flatten(0, 1),
            self._teacher.head_weight(),
            flatten_tokens(batch.labels.to(self._ranks.device)),
            token_weights=weights,
            vocab_start=student.vocab_start,
            group=self._ranks.tensor_group,
            sequence_parallel=self._ranks.sizes.sequence,
        )
        counted = (
            metrics.kl,
            metrics.student_cross_entropy,
            metrics.teacher_cross_entropy,
            metrics.top1_agreement,
            weights,
        )
        return torch.stack([values.double().sum() for values in counted])
