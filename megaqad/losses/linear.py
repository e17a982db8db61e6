"""A loss fused with the output heads: hidden states in, scalar out, and never the logits of more than one chunk.

For each chunk of tokens that carry a weight: two matrix products give FP32 logits of student and teacher in two reused
buffers, the objective reduces them, one all-gather of a few numbers per token completes the sums over the sharded
vocabulary, the gradient is written over logits that are done with, and two more products turn it into gradients of
hidden states and head. So the full-vocabulary loss is exact, costs little more than the four products of the heads, and
its memory is two chunks whatever the number of tokens.

Gradients are made during forward, where the logits are; backward multiplies them by the incoming scalar. Under
`torch.no_grad`, or if nothing requires a gradient, their half of the work is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaqad.losses import blocks, gemm, inputs, kernels, kl, reference
from megaqad.losses.inputs import Layout, Model, Tokens, Work
from megaqad.losses.objectives import CrossEntropy, ForwardKL, Objective
from megaqad.losses.objectives.base import ALL, Chunk
from megaqad.losses.sharding import Group, scatter_sequence_sum, sum_over_shards_


@dataclass
class _Outcome:
    """Results of one pass; gradients are of sum_i weight_i * loss_i, FP32, None where not asked for."""

    token_loss: Tensor
    """FP32 [N]"""
    loss: Tensor
    """FP32 scalar"""
    hidden_gradient: Tensor | None
    """[N, H] or [N / ranks, H], complete"""
    head_gradient: Tensor | None
    """[V_local, H]"""


@dataclass(frozen=True)
class _Plan:
    objective: Objective
    kernel: kernels.Kernel
    tokens: Tokens
    layout: Layout
    accumulate_into: Tensor | None
    accumulated: Callable[[], None]
    wants_hidden: bool
    wants_head: bool
    work: Work | None


def _run(student: Model, teacher: Model | None, plan: _Plan) -> _Outcome:
    """All chunks of one call. Collectives: see `linear_divergence`."""
    work = plan.work
    if work is None:
        work = inputs.agree_on_work(student, teacher, plan.tokens, plan.layout, hidden_gradient=plan.wants_hidden)
    else:
        inputs.check(student, teacher, plan.tokens, plan.layout)
    student = inputs.whole_sequence(student, plan.layout)
    teacher = None if teacher is None else inputs.whole_sequence(teacher, plan.layout)
    longest = max((chunk.shape[0] for chunk in work.chunks), default=0)
    buffers = gemm.logit_buffers(1 if teacher is None else 2, longest, student.head)
    narrow = gemm.direct(student.hidden, student.head)
    wanted = work.any_hidden_gradient or plan.wants_head
    apart = wanted and narrow and not plan.kernel.in_order
    slopes = student.head.new_empty(longest, len(student.head)) if apart else None
    token_loss = student.head.new_zeros(len(plan.tokens.weights), dtype=torch.float64)
    hidden_gradient = torch.zeros_like(student.hidden, dtype=torch.float32) if work.any_hidden_gradient else None
    head_gradient: Tensor | None = None
    for tokens in work.chunks:
        chunk = _logits(student, teacher, plan.tokens, tokens, buffers)
        evaluation = plan.objective.open(chunk, plan.kernel)
        for _ in range(evaluation.rounds):
            evaluation.merge(kl.gathered_statistics(evaluation.local(), plan.layout.group))
        token_loss[tokens] = evaluation.loss
        if not wanted:
            continue
        slope = _slope(chunk, slopes, narrow=narrow)
        evaluation.gradient(ALL, plan.tokens.weights[tokens].double(), out=slope)
        if hidden_gradient is not None:
            hidden_gradient[tokens] = gemm.hidden_gradient(slope, student.head)
        if plan.wants_head:
            head_gradient = gemm.head_gradient(head_gradient, slope, student.hidden[tokens])
    if plan.wants_head and head_gradient is None:
        head_gradient = student.head.new_zeros(student.head.shape, dtype=torch.float32)
    loss = (token_loss * plan.tokens.weights).sum().float()  # of a token without weight the stored loss is 0
    return _Outcome(token_loss.float(), loss, _reduced(hidden_gradient, plan.layout), head_gradient)


def _logits(student: Model, teacher: Model | None, all_tokens: Tokens, chosen: Tensor, buffers: Tensor) -> Chunk:
    """Logits of the chosen tokens, written into `buffers` [models, tokens, V_local] FP32."""
    labels = None
    if all_tokens.labels is not None:
        labels = inputs.local_labels(all_tokens.labels[chosen], all_tokens.vocab_start, len(student.head))
    first, *rest = buffers[:, : len(chosen)]
    logits = gemm.logits_(first, student.hidden[chosen], student.head)
    return Chunk(
        logits, None if teacher is None else gemm.logits_(rest[0], teacher.hidden[chosen], teacher.head), labels
    )


def _slope(chunk: Chunk, slopes: Tensor | None, *, narrow: bool) -> Tensor:
    """Where the gradient of the chunk's logits [n, V_local] goes: into the memory of logits that are done with.

    FP32 takes the place of the student's. BF16 (`narrow`) takes the first half of each row of the teacher's, or of the
    student's where there is no teacher; from a kernel that does not work in order it has memory of its own, `slopes`.
    """
    if not narrow:
        return chunk.student
    if slopes is not None:
        return slopes[: len(chunk.student)]
    free = chunk.student if chunk.teacher is None else chunk.teacher
    return free.view(torch.bfloat16)[:, : free.shape[1]]


def _reduced(partial: Tensor | None, layout: Layout) -> Tensor | None:
    """The hidden states' gradient summed over vocabulary shards, as the hidden states were given."""
    if partial is None or layout.group is None:
        return partial
    if layout.sequence_parallel:
        return scatter_sequence_sum(partial, layout.group)
    return sum_over_shards_(partial, layout.group)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor * gradient [n, m], multiplied in FP32 and only then rounded to `dtype`; the memory is gone over once."""
    if dtype == gradient.dtype:
        return gradient.mul_(factor)
    result = torch.empty_like(gradient, dtype=dtype)
    if gradient.is_cuda:
        return torch.mul(gradient, factor, out=result)
    for rows in blocks.row_blocks(*gradient.shape):  # on the CPU `out` of another type makes a whole FP32 copy first
        result[rows] = gradient[rows] * factor
    return result


class _GradientsInForwardThenScale(torch.autograd.Function):
    """Forward: loss and gradients. Backward: gradients times the incoming scalar; no collective."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, teacher: Model | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        outcome = _run(Model(hidden, head), teacher, plan)
        ctx.accumulate_into, ctx.accumulated = plan.accumulate_into, plan.accumulated
        ctx.types = (hidden.dtype, head.dtype)
        ctx.gradients = (outcome.hidden_gradient if plan.wants_hidden else None, outcome.head_gradient)
        ctx.mark_non_differentiable(outcome.token_loss)
        return outcome.loss, outcome.token_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed out; call the loss again")
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None
        if hidden_gradient is not None:
            hidden_gradient = _scaled(hidden_gradient, grad_loss, ctx.types[0])
        if head_gradient is not None and ctx.accumulate_into is not None:
            ctx.accumulate_into.addcmul_(head_gradient, grad_loss)
            head_gradient = None
            ctx.accumulated()
        elif head_gradient is not None:
            head_gradient = _scaled(head_gradient, grad_loss, ctx.types[1])
        return hidden_gradient, head_gradient, None, None


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    *,
    objective: Objective,
    token_weights: Tensor,
    labels: Tensor | None = None,
    vocab_start: int = 0,
    group: Group = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,
    accumulated: Callable[[], None] = lambda: None,
    work: Work | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """loss = sum_i token_weights[i] * objective_i, and the tokens' own losses, from hidden states and heads.

    Sharding in: `student_head` [V_local, H_s] and `teacher_head` [V_local, H_t] are this rank's vocabulary rows, the
    same rows in both; shards may differ in size and may be empty. `group=None`: not sharded. `student_hidden` [N,
    H_s] and `teacher_hidden` [N, H_t] are replicated over `group`, or, with `sequence_parallel`, rank r holds the
    r-th of the equal contiguous slices [N / ranks, H]. `token_weights` [N] and `labels` int64 [N] (global vocabulary
    ids) are always whole and equal on all ranks; `vocab_start` is the id of this rank's first row. FP32 or BF16.
    Sharding out: the scalar loss (FP32, differentiable in `student_hidden` and `student_head`) and the tokens' losses
    (FP32 [N], detached, 0 where the weight is 0), the same on every rank. The gradient of `student_hidden` is
    complete and sharded as its input; that of `student_head` is this rank's rows. Neither may be reduced over `group`
    again. Collectives: one small all-gather to agree on the work, one all-gather of statistics per chunk (two for
    Jensen-Shannon), one all-reduce of the hidden states' gradient (reduce-scatter, and an all-gather of hidden
    states, under sequence parallelism). All in forward; the sequence is the same on all ranks. None in backward.

    Tokens of weight 0 take no part in any product and may hold NaN. `accumulate_into` (FP32 [V_local, H_s],
    Megatron-Core's `main_grad` of the head) receives the head's gradient in backward, added in FP32; autograd then
    gets None for the head, and `accumulated` is called. Backward may run once per call. A head padded to a round number
    of rows: give `head[:rows]`, the rows that are vocabulary, for both models; padding then takes no part, and its
    gradient is 0. `work`: what `plan_work` gave for these tokens; then nothing here waits for the device. Raises
    ValueError, on every rank, for arguments that do not fit together.
    """
    teacher = None
    if objective.needs_teacher:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError(f"{objective} needs the teacher's hidden states and head")
        teacher = Model(teacher_hidden, teacher_head)
    if objective.needs_labels and labels is None:
        raise ValueError(f"{objective} needs labels")
    if accumulate_into is not None and (
        accumulate_into.dtype != torch.float32 or accumulate_into.shape != student_head.shape
    ):
        raise ValueError(
            f"accumulate_into is {accumulate_into.dtype} {tuple(accumulate_into.shape)}; the head's main gradient "
            f"must be float32 {tuple(student_head.shape)}"
        )
    if impl == "reference":
        return reference.linear_divergence(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            dense=objective.dense,
            token_weights=token_weights,
            labels=labels,
            group=group,
            sequence_parallel=sequence_parallel,
            accumulate_into=accumulate_into,
        )
    with_grad = torch.is_grad_enabled()
    plan = _Plan(
        objective=objective,
        kernel=kernels.choose(impl, student_head.device, {torch.float32}),
        tokens=Tokens(token_weights.detach(), labels if objective.needs_labels else None, vocab_start),
        layout=Layout(group, sequence_parallel),
        accumulate_into=accumulate_into,
        accumulated=accumulated,
        wants_hidden=with_grad and student_hidden.requires_grad,
        wants_head=with_grad and student_head.requires_grad,
        work=work,
    )
    if accumulate_into is not None and plan.wants_hidden:
        student_head = student_head.detach()  # hooks of its parameter would take None for a gradient that was forgotten
    loss, token_loss = _GradientsInForwardThenScale.apply(student_hidden, student_head, teacher, plan)
    return loss, token_loss


def linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    token_weights: Tensor,
    temperature: float = 1.0,
    group: Group = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """sum_i token_weights[i] * KL_i(teacher || student), exact over the whole vocabulary, and KL [N] detached.

    `linear_divergence` with `ForwardKL(temperature)`: sharding, collectives, gradients and errors are described there.
    """
    return linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        objective=ForwardKL(temperature),
        token_weights=token_weights,
        group=group,
        sequence_parallel=sequence_parallel,
        accumulate_into=accumulate_into,
        impl=impl,
    )


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab_start: int = 0,
    group: Group = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """sum_i token_weights[i] * -log p_i(label_i), and the tokens' cross entropies [N] detached.

    `linear_divergence` with `CrossEntropy()` and no teacher; `labels` int64 [N] are global vocabulary ids.
    """
    return linear_divergence(
        hidden,
        head,
        None,
        None,
        objective=CrossEntropy(),
        token_weights=token_weights,
        labels=labels,
        vocab_start=vocab_start,
        group=group,
        sequence_parallel=sequence_parallel,
        accumulate_into=accumulate_into,
        impl=impl,
    )
