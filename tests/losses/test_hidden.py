"""The cosine distance of hidden states, replicated and sequence parallel."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megaqad.losses import hidden_cosine
from tests.losses.oracle import relative_error


def states() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(12, 16, generator=draw)
    student = teacher + 0.3 * torch.randn(12, 16, generator=draw)
    weights = torch.rand(12, generator=draw) + 0.5
    weights[::5] = 0
    student[0], teacher[5] = torch.nan, torch.nan
    return student, teacher, weights


def run(rank: int, world_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, weights = states()
    mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size) if sequence_parallel else slice(None)
    leaf = student[mine].clone().requires_grad_()
    loss, distance = hidden_cosine(
        leaf,
        teacher[mine],
        token_weights=weights,
        group=dist.group.WORLD if world_size > 1 else None,
        sequence_parallel=sequence_parallel,
    )
    (2 * loss).backward()
    return loss.detach(), distance, leaf.grad


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (3, True)])
def test_loss_and_gradient(run_ranks, world_size: int, sequence_parallel: bool) -> None:
    student, teacher, weights = states()
    keep = weights != 0
    leaf = student[keep].double().requires_grad_()
    true_distance = 1 - F.cosine_similarity(leaf, teacher[keep].double(), dim=-1)
    true_loss = (true_distance * weights[keep]).sum()
    (2 * true_loss).backward()
    ranks = run_ranks(world_size, run, sequence_parallel) if world_size > 1 else [run(0, 1, False)]
    for loss, _, _ in ranks:
        assert (loss - true_loss.detach()).abs() <= 1e-6
    distance, gradient = (
        torch.cat([rank[index] for rank in ranks]) if sequence_parallel else ranks[0][index] for index in (1, 2)
    )
    assert (distance[keep] - true_distance.detach()).abs().max() <= 1e-6
    assert relative_error(gradient[keep], leaf.grad) <= 1e-6
    assert (distance[~keep] == 0).all()
    assert (gradient[~keep] == 0).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="project the student's onto the teacher's size first"):
        hidden_cosine(torch.zeros(4, 8), torch.zeros(4, 9), token_weights=torch.ones(4))
    with pytest.raises(ValueError, match="token_weights 5"):
        hidden_cosine(torch.zeros(4, 8), torch.zeros(4, 8), token_weights=torch.ones(5))
