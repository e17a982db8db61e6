"""One training step: the teacher's pass, then the student's under its pipeline schedule, then the update.

The teacher runs first, forward only, over the whole global batch, and leaves its last hidden states on the last
stage, where the loss is computed (``teachers.py`` has other ways to come by them). The student then runs under whatever
schedule Megatron-Core chooses (1F1B, interleaved 1F1B) as in plain training; nothing of the teacher travels through its
pipeline. A step costs one forward more than fine-tuning and ``tokens x hidden`` of memory on the last stage.

The loss is a weighted sum over tokens. The gradient is divided once by the sum of the weights of the global batch, so
neither microbatches nor data-parallel ranks are averaged over.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megaqad.data.batch import Batch, flatten_tokens
from megaqad.distillation.finite import Fault, FiniteWatch, explain_teacher, teacher_fault
from megaqad.distillation.hidden import HiddenLoss
from megaqad.distillation.teachers import Teacher
from megaqad.errors import UserError
from megaqad.losses import CrossEntropy, ForwardKL, linear_divergence
from megaqad.losses import Objective as Divergence
from megaqad.losses.inputs import Layout, Tokens, plan_work
from megaqad.models.causal_lm import CausalLM
from megaqad.models.model import Model
from megaqad.models.shared_heads import spread_shared_weights, sum_shared_gradients
from megaqad.runtime.agree import gather_problems
from megaqad.runtime.schedule import run_schedule


class Objective(Enum):
    """What the student learns from."""

    QAD = "qad"  # the teacher's full distribution, by forward KL if not told otherwise (arXiv 2601.20088)
    QAT = "qat"  # cross entropy to the data's next token; also plain pretraining


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch, by their weights."""
    tokens: int
    """Of the global batch that count."""
    grad_norm: float
    """L2 norm of the whole model's gradient before clipping."""
    lr: float
    fault: Fault | None = None
    """What was not finite; weights and moments are then as they were before the step."""


class DistillationStep:
    """A trainable student, its optimizer, and the frozen teacher it learns from."""

    def __init__(
        self,
        model: Model,
        student: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        *,
        objective: Objective,
        teacher: Teacher | None = None,
        divergence: Divergence | None = None,
        hidden: HiddenLoss | None = None,
    ) -> None:
        """
        Args:
            model: what is trained, quantizers on.
            student: its chunks, wrapped in Megatron-Core's DDP.
            teacher: what the student learns from; required by ``Objective.QAD`` unless nothing asks for it.
            divergence: the loss of ``Objective.QAD``; forward KL when None. ``Objective.QAT`` is cross entropy.
            hidden: a further loss on hidden states, from the same teacher; ``Objective.QAD`` only.
        """
        self.model = model
        self.student = list(student)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.ranks = model.ranks
        self.objective = objective
        self.divergence = CrossEntropy() if objective is Objective.QAT else divergence or ForwardKL()
        self.hidden = hidden if objective is Objective.QAD else None
        needs_teacher = self.divergence.needs_teacher or self.hidden is not None
        assert not needs_teacher or teacher is not None, "distillation needs a teacher"
        self.teacher = teacher if needs_teacher else None
        self.watch = FiniteWatch(self.student, self.ranks)
        self._weight_sum = 0.0
        for chunk in self.student:
            chunk.module.config.finalize_model_grads_func = self._finish_gradients

    def __call__(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Train on one global batch, of which ``micro_batches`` is this data-parallel rank's share.

        A step whose loss or gradient is not finite leaves weights and moments alone; the schedule moves on with the
        data either way.

        Collectives: the schedules', the gradient reduction, two sums over data-parallel ranks and one over stages,
        those of the losses and of ``FiniteWatch.fault``. The device is waited for as the step begins, when it has
        nothing to do, and when the gradient is there; not in between.

        Raises:
            UserError: the teacher gives NaN or Inf; the message says where.
        """
        self._weight_sum, tokens = self._count(micro_batches)
        prepared = self._with_teacher(self._planned(micro_batches))
        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.watch.begin()
        weights = [batch.weights for batch in prepared]
        with self.hidden.compared(weights) if self.hidden is not None else nullcontext():
            per_micro_batch = self._forward_backward(prepared)
        loss = self._mean(per_micro_batch)
        fault = self.watch.fault(per_micro_batch)
        if fault is not None:
            self._refuse_bad_teacher(prepared)
        grad_norm = None if fault is not None else self.optimizer.step()[1]
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=1)
        if fault is None:
            spread_shared_weights(self.model)
            self.model.changed()
        return StepResult(loss=loss, tokens=tokens, grad_norm=float(grad_norm or 0.0), lr=lr, fault=fault)

    def _with_teacher(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """Run the teacher pass and attach its hidden states where the loss is computed."""
        if self.teacher is None:
            return list(micro_batches)
        with self.hidden.captured() if self.hidden is not None else nullcontext():
            hidden = self.teacher.last_hidden([batch.tokens for batch in micro_batches])
        if not self.ranks.is_last_stage:
            return list(micro_batches)
        return [replace(batch, teacher_hidden=kept) for batch, kept in zip(micro_batches, hidden, strict=True)]

    def _refuse_bad_teacher(self, micro_batches: Sequence[Batch]) -> None:
        """Raise when a step failed because the teacher's numbers are none: no later step can fix them. Collective."""
        if self.teacher is None:
            return
        hidden = [batch.teacher_hidden for batch in micro_batches if batch.teacher_hidden is not None]
        weights = [batch.weights for batch in micro_batches]
        faults = gather_problems(teacher_fault(self.teacher, hidden, weights, self.ranks))
        if faults:
            raise UserError(explain_teacher(faults, step=self.scheduler.num_steps + 1))

    def _planned(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """With what the losses will look at, on the last stage. Collective over its tensor-parallel ranks."""
        if not self.ranks.is_last_stage:
            return list(micro_batches)
        chunk, layout = self.model.last, Layout(self.ranks.tensor_group, self.ranks.sizes.sequence)
        columns = len(chunk.original_head()) if self._taught_by is None else len(self._taught_by.head_weight())
        planned = []
        for batch in micro_batches:
            labels = flatten_tokens(batch.labels) if self.divergence.needs_labels else None
            tokens = Tokens(flatten_tokens(batch.weights), labels, chunk.vocab_start)
            planned.append(replace(batch, work=plan_work(tokens, columns, layout)))
        return planned

    @property
    def _taught_by(self) -> Teacher | None:
        """Whose distribution the loss compares with, if with any."""
        return self.teacher if self.divergence.needs_teacher else None

    def _count(self, micro_batches: Sequence[Batch]) -> tuple[float, int]:
        """Sum of the token weights of the global batch, and how many are not 0; the same on every rank."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        for batch in micro_batches:
            counts += torch.stack([batch.weights.double().sum(), batch.weights.count_nonzero().double()])
        dist.all_reduce(counts, group=self.ranks.data_group)
        weight_sum, tokens = counts.tolist()
        return weight_sum, int(tokens)

    def _forward_backward(self, micro_batches: list[Batch], *, force_all_reduce: bool = False) -> list[Tensor]:
        """Losses of the microbatches on the last stage; gradients in the buffers, each data-parallel rank its share, or
        with ``force_all_reduce`` all of it."""
        batch_size, length = micro_batches[0].tokens.shape
        return run_schedule(
            self.ranks,
            self.student,
            self._forward_step,
            micro_batches,
            config=self.model.chunks[0].config,
            shape=(batch_size, length),
            forward_only=False,
            force_all_reduce=force_all_reduce,
        )

    def _forward_step(self, batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        """What Megatron-Core's schedules call for each microbatch of each chunk."""
        batch = next(batches)

        def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss = self._loss(hidden, model.module, batch)
            # Megatron-Core counts tokens in whole numbers; what divides the gradient is in ``_finish_gradients``.
            return loss, torch.ones((), dtype=torch.int, device=loss.device), loss.detach()

        return model(batch.tokens), loss_of

    def _finish_gradients(
        self, chunks: list[DistributedDataParallel], *_: Any, force_all_reduce: bool = False, **__: Any
    ) -> None:
        """What Megatron-Core's schedules call when the last gradient is there: reduce over data, embedding and
        sequence-parallel ranks, then divide by the weights of the global batch."""
        finalize_model_grads(chunks, None, pg_collection=self.ranks.groups, force_all_reduce=force_all_reduce)
        sum_shared_gradients(self.model)
        if self._weight_sum > 0:
            for chunk in chunks:
                chunk.scale_gradients(float(np.float32(1.0) / np.float32(self._weight_sum)))

    def _loss(self, hidden: Tensor, model: CausalLM, batch: Batch) -> Tensor:
        """Sum of the token losses. ``hidden``: [s(/tp), b, h] on the last stage."""
        head, main_grad = model.head_weight(), model.head_main_grad()
        teacher_hidden = teacher_head = None
        if self._taught_by is not None:
            assert batch.teacher_hidden is not None
            teacher_hidden, teacher_head = batch.teacher_hidden.flatten(0, 1), self._taught_by.head_weight()
            rows = len(teacher_head)  # a teacher may have fewer ids (``Architecture.teaching``)
            head, main_grad = head[:rows], None if main_grad is None else main_grad[:rows]
        loss, _ = linear_divergence(
            hidden.flatten(0, 1),
            head,
            teacher_hidden,
            teacher_head,
            objective=self.divergence,
            token_weights=flatten_tokens(batch.weights),
            labels=flatten_tokens(batch.labels),
            vocab_start=model.vocab_start,
            group=self.ranks.tensor_group,
            sequence_parallel=self.ranks.sizes.sequence,
            accumulate_into=main_grad,
            accumulated=self._head_is_ready,
            work=batch.work,
        )
        return loss

    def _head_is_ready(self) -> None:
        """Tell DDP, if it reduces gradients as they come, that the head's is there: autograd has none for it. A head
        that is this chunk's embedding too is ready with that one's."""
        wrapped = self.student[-1]
        chunk: CausalLM = wrapped.module
        shared = chunk.pre_process and chunk.share_embeddings_and_output_weights
        if wrapped.ddp_config.overlap_grad_reduce and not shared:
            parameter = chunk.head_parameter
            wrapped.param_to_bucket_group[parameter].register_grad_ready(parameter, wrapped.force_all_reduce)

    def _mean(self, losses: Sequence[Tensor]) -> float:
        """Loss of the global batch per unit of token weight, on every rank; ``losses``: of the last stage."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for loss in losses:
            total += loss.double()
        if self.hidden is not None:
            total += self.hidden.value()
        dist.all_reduce(total, group=self.ranks.data_group)
        if self.ranks.sizes.pipeline > 1:
            dist.all_reduce(total, group=self.ranks.pipeline_group)
        return float(total) / self._weight_sum if self._weight_sum > 0 else float(total)
