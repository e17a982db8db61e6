"""Losses on hidden states, for any pipeline stage.

*Cosine*: how far each token's two vectors point in different directions; both models have the same width.

*Linear CKA* (Kornblith et al. 2019, arXiv 1905.00414): how alike two sets of vectors are, whatever rotation and scale
lies between them, so widths may differ. With X and Y the tokens' vectors, centred and weighted,

    CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|),   Frobenius norms;   1 when Y = s X Q with Q orthogonal

It is a number of a batch, not of a token: no sum over tokens gives it, and a batch cut in two has two of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megaqad.losses.sharding import Group, group_rank, group_size


def hidden_cosine(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    token_weights: Tensor,
    group: Group = None,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """loss = sum_i token_weights[i] * (1 - cos(student_i, teacher_i)), and the tokens' own distances, detached.

    Sharding in: hidden states [N, H] with the whole hidden dimension, replicated over `group`; with `sequence_parallel`
    rank r holds the r-th of the equal contiguous slices [N / ranks, H]. `token_weights` [N] is always whole.
    Sharding out: the scalar loss over all tokens, FP32, the same on every rank, differentiable in this rank's
    `student_hidden`; distances FP32 [N] or [N / ranks], 0 where the weight is 0.
    Collectives: none; under sequence parallelism one all-reduce of a scalar in forward, none in backward. Computed in
    FP32. Raises ValueError for shapes that do not fit.
    """
    ranks = group_size(group) if sequence_parallel else 1
    if student_hidden.ndim != 2 or student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"hidden states of student {tuple(student_hidden.shape)} and teacher {tuple(teacher_hidden.shape)} must be "
            "the same [tokens, hidden]; project the student's onto the teacher's size first"
        )
    weights = _own_weights(token_weights, student_hidden.shape[0], ranks, group)
    active = torch.nonzero(weights).squeeze(-1)
    distance = 1 - F.cosine_similarity(student_hidden[active].float(), teacher_hidden.detach()[active].float(), dim=-1)
    loss = (distance * weights[active]).sum().float()
    if ranks > 1:
        others = loss.detach().clone()
        dist.all_reduce(others, group=group)
        # the value is everyone's sum; the gradient stays this rank's own, for its tokens are nobody else's
        loss = loss + (others - loss.detach())
    everyone = torch.zeros(weights.shape[0], dtype=torch.float32, device=weights.device)
    return loss, everyone.index_copy(0, active, distance.detach())


def _own_weights(token_weights: Tensor, count: int, ranks: int, group: Group) -> Tensor:
    """The weights [count] of this rank's tokens, from those of all [count * ranks]; ValueError if they do not fit."""
    tokens = token_weights.shape[0]
    if count * ranks != tokens:
        raise ValueError(f"hidden states hold {count} tokens on each of {ranks} ranks, token_weights {tokens}")
    return token_weights.detach().chunk(ranks)[group_rank(group)] if ranks > 1 else token_weights.detach()


def hidden_cka(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    token_weights: Tensor,
    group: Group = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """loss = sum_i token_weights[i] * (1 - CKA), with the one linear CKA of all these tokens.

    The weights also weigh the tokens inside CKA: means and products are weighted sums, so that a token of weight 0
    takes no part (and may hold NaN), and one of weight 2 counts as two. With all weights 0 the loss is 0.

    Sharding in: `student_hidden` [N, H_s], `teacher_hidden` [N, H_t], any two widths, replicated over `group`; with
    `sequence_parallel` rank r holds the r-th of the equal contiguous slices [N / ranks, H]. `token_weights` [N] whole.
    Sharding out: the scalar loss, FP32, the same on every rank, differentiable in this rank's `student_hidden`.
    Collectives: none; under sequence parallelism one all-reduce of the sums [H_s + H_t] and one of the products
    [(H_s + H_t)^2] in forward, none in backward. Products in FP32, their norms in FP64. Raises ValueError for shapes
    that do not fit.
    """
    ranks = group_size(group) if sequence_parallel else 1
    if student_hidden.ndim != 2 or teacher_hidden.ndim != 2 or student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"hidden states of student {tuple(student_hidden.shape)} and teacher {tuple(teacher_hidden.shape)} must be "
            "[tokens, hidden] of the same tokens"
        )
    weights = _own_weights(token_weights, student_hidden.shape[0], ranks, group)
    total = float(token_weights.double().sum())
    shared = group if sequence_parallel else None
    loss: Tensor = _LinearCKA.apply(student_hidden, teacher_hidden.detach(), weights.float(), total, shared)
    return loss


class _LinearCKA(torch.autograd.Function):
    """Forward: loss and gradient. Backward: the gradient times the incoming scalar; no collective.

    With c = |Y^T X|^2, a = |X^T X|^2, b = |Y^T Y|^2 and centred, weighted rows: dCKA/dX = CKA [2 Y (Y^T X) / c - 2 X
    (X^T X) / a]. Centring needs no term of its own: the weighted rows of X and Y add up to 0.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, total: float, group: Group) -> Tensor:
        active = torch.nonzero(weights).squeeze(-1)
        root = weights[active].sqrt().unsqueeze(-1)  # [n, 1]
        both = torch.cat([student[active].float(), teacher[active].float()], dim=-1)  # [n, H_s + H_t]
        mean = _summed((both.double() * root.double().square()).sum(0), group) / max(total, 1e-30)
        both = (both - mean.float()) * root
        products = _summed(both.t() @ both, group)  # [H_s + H_t, H_s + H_t]
        width = student.shape[1]
        own, cross = products[:width, :width], products[width:, :width]
        own_square, cross_square, teacher_square = (
            block.double().square().sum() for block in (own, cross, products[width:, width:])
        )
        cka = cross_square / (own_square * teacher_square).sqrt()
        gradient = torch.zeros_like(student, dtype=torch.float32)
        if not bool((own_square > 0) & (teacher_square > 0)):  # one constant vector, or no token at all
            ctx.save_for_backward(gradient)
            return torch.full((), total, dtype=torch.float32, device=student.device)
        # the two terms nearly cancel for a student near its teacher: one product of the difference, not a difference
        # of two products
        slope = torch.cat([-(own.double() / own_square), cross.double() / cross_square.clamp_min(1e-300)]).float()
        ctx.save_for_backward(gradient)
        gradient[active] = (both @ slope) * root * (-2 * total * cka).float()
        return (total * (1 - cka)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None


def _summed(values: Tensor, group: Group) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values
