"""The losses as one would write them on paper: whole vocabulary, FP64, differentiated by autograd.

Nothing here is clever. A rank gathers the other ranks' logits as constants, puts its own differentiable shard in its
place, and computes the loss over the dense vocabulary with `log_softmax`; autograd then gives exactly this rank's
part of the gradient. Every fast path has the same signature and is tested against this file.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megaqad.losses.blocks import row_blocks
from megaqad.losses.sharding import Group, agree, group_rank, group_size

FLOOR = -1e30
_FP32_PER_FP64 = 2
"""An FP64 number is two FP32 numbers; `row_blocks` counts the latter."""


def whole_vocabulary(local: Tensor, group: Group) -> Tensor:
    """[n, V_local] -> FP64 [n, V], differentiable in this rank's columns only; -inf becomes -1e30. One all-gather."""
    local = local.double().clamp(min=FLOOR)
    if group is None:
        return local
    widths = agree({"columns": local.shape[1]}, group, local.device)["columns"]
    padded = local.new_zeros(local.shape[0], max(widths))
    padded[:, : local.shape[1]] = local.detach()
    shards = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(shards, padded, group=group)
    parts = [shard[:, :width] for shard, width in zip(shards, widths, strict=True)]
    parts[group_rank(group)] = local
    return torch.cat(parts, dim=1)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """sum_v p_t (log p_t - log p_s): dense logits FP64 [n, V] -> [n]."""
    log_p_s = torch.log_softmax(student / temperature, dim=-1)
    log_p_t = torch.log_softmax(teacher / temperature, dim=-1)
    return (log_p_t.exp() * (log_p_t - log_p_s)).sum(-1)


def generalized_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t + (1 - beta) p_s: dense logits [n, V] -> [n]."""
    log_p_s = torch.log_softmax(student / temperature, dim=-1)
    log_p_t = torch.log_softmax(teacher / temperature, dim=-1)
    log_m = torch.logaddexp(log_p_t + math.log(beta), log_p_s + math.log(1 - beta))
    from_teacher = (log_p_t.exp() * (log_p_t - log_m)).sum(-1)
    from_student = (log_p_s.exp() * (log_p_s - log_m)).sum(-1)
    return beta * from_teacher + (1 - beta) * from_student


def logit_mse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean squared difference over the columns that neither model pads: dense logits [n, V] -> [n]."""
    counted = (student > FLOOR) & (teacher > FLOOR)
    difference = torch.where(counted, (student - teacher) / temperature, 0.0)
    return difference.square().sum(-1) / counted.sum(-1)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log p_s(label): dense logits FP64 [n, V], labels [n] -> [n]."""
    return -torch.log_softmax(student, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class _RowsAgainInBackward(torch.autograd.Function):
    """Forward and backward go over the rows in blocks, so that FP64 copies exist of a few rows only.

    Collectives, per block and in both directions: those of `whole_vocabulary`.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Group, inplace: bool) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.temperature, ctx.group, ctx.inplace = temperature, group, inplace
        ctx.columns = sum(agree({"columns": student.shape[1]}, group, student.device)["columns"])
        token_kl = torch.zeros(len(student), dtype=torch.float32, device=student.device)
        for rows in row_blocks(len(student), _FP32_PER_FP64 * ctx.columns):
            dense = whole_vocabulary(student[rows], group), whole_vocabulary(teacher[rows], group)
            token_kl[rows] = forward_kl(*dense, temperature).float()
        return token_kl

    @staticmethod
    def backward(ctx: Any, grad_token_kl: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        out = student.detach() if ctx.inplace else torch.empty_like(student)
        for rows in row_blocks(len(student), _FP32_PER_FP64 * ctx.columns):
            leaf = student.detach()[rows].clone().requires_grad_()
            with torch.enable_grad():
                dense = whole_vocabulary(leaf, ctx.group), whole_vocabulary(teacher[rows], ctx.group)
                token_kl = forward_kl(*dense, ctx.temperature)
            (out[rows],) = torch.autograd.grad(token_kl, leaf, grad_token_kl[rows].double())
        return out, None, None, None, None


def vocab_parallel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    token_mask: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """See `megaqad.losses.vocab_parallel_kl`."""
    student, teacher = student_logits, teacher_logits.detach()
    if token_mask is None:
        return _RowsAgainInBackward.apply(student, teacher, temperature, group, inplace)
    kept = _RowsAgainInBackward.apply(student[token_mask], teacher[token_mask], temperature, group, inplace)
    return torch.zeros(len(student), device=student.device).masked_scatter(token_mask, kept)


class _IdentityThenDeposit(torch.autograd.Function):
    """Forward: identity. Backward: the gradient is added to a buffer and goes no further."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return head.view_as(head)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.buffer.add_(gradient)
        return None, None


class _IdentityThenAllReduce(torch.autograd.Function):
    """Forward: identity. Backward: the sum over the group of the ranks' partial gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, partial: Tensor) -> tuple[Tensor, None]:
        total = partial.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllGatherThenReduceScatter(torch.autograd.Function):
    """Forward: [N / ranks, H] -> [N, H]. Backward: this rank's slice of the summed partial gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(hidden) for _ in range(group_size(group))]
        dist.all_gather(parts, hidden.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, partial: Tensor) -> tuple[Tensor, None]:
        group: Group = ctx.group
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total.chunk(group_size(group))[group_rank(group)], None


def replicated(hidden: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
    """Hidden states as every rank needs them, [N, H] FP64, with the collective that their gradient needs."""
    hidden = hidden.double()
    if group is None:
        return hidden
    if sequence_parallel:
        return _AllGatherThenReduceScatter.apply(hidden, group)
    return _IdentityThenAllReduce.apply(hidden, group)


Dense = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""(student logits, teacher logits, labels) -> loss of each token, over the whole vocabulary"""


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    *,
    dense: Dense,
    token_weights: Tensor,
    labels: Tensor | None = None,
    group: Group = None,
    sequence_parallel: bool = False,
    accumulate_into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megaqad.losses.linear_divergence`; `dense` is the objective's definition."""
    active = torch.nonzero(token_weights).squeeze(-1)
    head = student_head.double()
    if accumulate_into is not None:
        head = _IdentityThenDeposit.apply(head, accumulate_into)
    student = replicated(student_hidden, group, sequence_parallel)[active] @ head.t()
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        hidden = replicated(teacher_hidden.detach(), group, sequence_parallel)[active]
        teacher = whole_vocabulary(hidden @ teacher_head.detach().double().t(), group)
    token_loss = dense(whole_vocabulary(student, group), teacher, None if labels is None else labels[active])
    loss = (token_loss * token_weights[active]).sum().float()
    everyone = torch.zeros(len(token_weights), device=loss.device)
    return loss, everyone.index_copy(0, active, token_loss.detach().float())
