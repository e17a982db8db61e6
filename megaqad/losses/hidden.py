"""A loss on hidden states, for any pipeline stage: how far student and teacher point in different directions."""

import torch
from torch import Tensor
from torch import distributed as dist
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
    tokens = token_weights.shape[0]
    if student_hidden.ndim != 2 or student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"hidden states of student {tuple(student_hidden.shape)} and teacher {tuple(teacher_hidden.shape)} must be "
            "the same [tokens, hidden]; project the student's onto the teacher's size first"
        )
    if student_hidden.shape[0] * ranks != tokens:
        raise ValueError(
            f"hidden states hold {student_hidden.shape[0]} tokens on each of {ranks} ranks, token_weights {tokens}"
        )
    weights = token_weights.detach().chunk(ranks)[group_rank(group)] if ranks > 1 else token_weights.detach()
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
