"""One training step: the teacher's pass, then the student's under its pipeline schedule, then the update.

The teacher runs first, forward only, over the whole global batch, and leaves its last hidden states on the last
stage, where the loss is computed (``teachers.py`` has other ways to come by them). The student then runs under whatever
schedule Megatron-Core chooses (1F1B, interleaved 1F1B) as in plain training; nothing of the teacher travels through its
pipeline. A step costs one forward more than fine-tuning and ``tokens x hidden`` of memory on the last stage.

The loss is a sum over tokens. Megatron-Core divides the gradient once by the number of unmasked tokens of the global
batch (``calculate_per_token_loss``), so neither microbatches nor data-parallel ranks are averaged over.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaqad.distillation.finite import Fault, FiniteWatch, explain_teacher, teacher_fault
from megaqad.distillation.forward import flatten_tokens
from megaqad.distillation.hidden import HiddenLoss
from megaqad.distillation.teachers import Teacher
from megaqad.errors import UserError
from megaqad.losses import CrossEntropy, ForwardKL, linear_divergence
from megaqad.losses import Objective as Divergence
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.state import refresh_weights
from megaqad.runtime.agree import gather_problems
from megaqad.runtime.parallel import ParallelContext


class Objective(Enum):
    """What the student learns from."""

    QAD = "qad"  # the teacher's full distribution, by forward KL if not told otherwise (arXiv 2601.20088)
    QAT = "qat"  # cross entropy to the data's next token; also plain pretraining


@dataclass(frozen=True)
class MicroBatch:
    """One microbatch of this data-parallel rank."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s], global vocabulary ids
    token_weights: Tensor  # float32 [b, s], 0 leaves a token out of the loss
    teacher_hidden: Tensor | None = None  # [s(/tp), b, h] on the last stage of a QAD step


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the unmasked tokens of the global batch."""
    tokens: int
    grad_norm: float
    """L2 norm of the whole model's gradient before clipping."""
    lr: float
    fault: Fault | None = None
    """What was not finite; weights and moments are then as they were before the step."""


class DistillationStep:
    """A trainable student, its optimizer, and the frozen teacher it learns from."""

    def __init__(
        self,
        student: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        context: ParallelContext,
        *,
        objective: Objective,
        teacher: Teacher | None = None,
        divergence: Divergence | None = None,
        hidden: HiddenLoss | None = None,
    ) -> None:
        """
        Args:
            student: this rank's chunks, wrapped in Megatron-Core's DDP, quantizers on and refreshed.
            teacher: what the student learns from; required by ``Objective.QAD`` unless nothing asks for it.
            divergence: the loss of ``Objective.QAD``; forward KL when None. ``Objective.QAT`` is cross entropy.
            hidden: a further loss on hidden states, from the same teacher; ``Objective.QAD`` only.
        """
        self.student = list(student)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.context = context
        self.objective = objective
        self.divergence = CrossEntropy() if objective is Objective.QAT else divergence or ForwardKL()
        self.hidden = hidden if objective is Objective.QAD else None
        needs_teacher = self.divergence.needs_teacher or self.hidden is not None
        assert not needs_teacher or teacher is not None, "distillation needs a teacher"
        self.teacher = teacher if needs_teacher else None
        self.watch = FiniteWatch(self.student, context)

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Train on one global batch, of which ``micro_batches`` is this data-parallel rank's share.

        A step whose loss or gradient is not finite leaves weights and moments alone; the schedule moves on with the
        data either way.

        Collectives: the schedules', the gradient reduction, one sum of two numbers over data-parallel ranks and one
        over stages, one flag of the teacher's, those of the losses and of ``FiniteWatch.fault``.

        Raises:
            UserError: the teacher gives NaN or Inf; the message says where.
        """
        prepared = self._with_teacher(micro_batches)
        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.watch.begin()
        weights = [batch.token_weights for batch in prepared]
        with self.hidden.compared(weights) if self.hidden is not None else nullcontext():
            per_micro_batch = self._forward_backward(prepared)
        loss, tokens = self._reduce(per_micro_batch)
        fault = self.watch.fault([entry["loss"][0] for entry in per_micro_batch])
        grad_norm = None if fault is not None else self.optimizer.step()[1]
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=1)
        if fault is None:
            refresh_weights(self.student, self.context)
        return StepResult(loss=loss, tokens=tokens, grad_norm=float(grad_norm or 0.0), lr=lr, fault=fault)

    def _with_teacher(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Run the teacher pass and attach its hidden states where the loss is computed."""
        if self.teacher is None:
            return list(micro_batches)
        with self.hidden.captured() if self.hidden is not None else nullcontext():
            hidden = self.teacher.last_hidden([batch.tokens for batch in micro_batches])
        weights = [batch.token_weights for batch in micro_batches]
        faults = gather_problems(teacher_fault(self.teacher, hidden, weights, self.context))
        if faults:
            raise UserError(explain_teacher(faults, step=self.scheduler.num_steps + 1))
        if not self.context.is_last_stage:
            return list(micro_batches)
        return [replace(batch, teacher_hidden=kept) for batch, kept in zip(micro_batches, hidden, strict=True)]

    def _forward_backward(self, micro_batches: list[MicroBatch]) -> list[dict[str, Tensor]]:
        iterators = [iter(micro_batches) for _ in self.student]
        micro_batch_size, sequence_length = micro_batches[0].tokens.shape
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.student,
            num_microbatches=len(micro_batches),
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )

    def _forward_step(self, batches: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        """What Megatron-Core's schedules call for each microbatch of each chunk."""
        batch = next(batches)

        def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss = self._loss(hidden, model.module, batch)
            tokens = batch.token_weights.count_nonzero()
            return loss, tokens.int(), {"loss": torch.stack([loss.detach().double(), tokens.double()])}

        return model(batch.tokens), loss_of

    def _loss(self, hidden: Tensor, model: CausalLM, batch: MicroBatch) -> Tensor:
        """Sum of the token losses. ``hidden``: [s(/tp), b, h] on the last stage."""
        taught = self.divergence.needs_teacher
        assert not taught or (self.teacher is not None and batch.teacher_hidden is not None)
        loss, _ = linear_divergence(
            hidden.flatten(0, 1),
            model.head_weight(),
            batch.teacher_hidden.flatten(0, 1) if taught and batch.teacher_hidden is not None else None,
            self.teacher.head_weight() if taught and self.teacher is not None else None,
            objective=self.divergence,
            token_weights=flatten_tokens(batch.token_weights),
            labels=flatten_tokens(batch.labels),
            vocab_start=model.vocab_start,
            group=self.context.tensor_group,
            sequence_parallel=self.context.sizes.sequence,
            accumulate_into=model.head_main_grad(),
        )
        return loss

    def _reduce(self, per_micro_batch: list[dict[str, Tensor]]) -> tuple[float, int]:
        """Mean loss and number of tokens of the global batch, on every rank."""
        total = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        for entry in per_micro_batch:  # of the last stage
            total += entry["loss"]
        if self.hidden is not None:
            total[0] += self.hidden.value()
        dist.all_reduce(total, group=self.context.data_group)
        if self.context.sizes.pipeline > 1:
            dist.all_reduce(total, group=self.context.pipeline_group)
        loss, tokens = total.tolist()
        return loss / max(tokens, 1.0), int(tokens)
