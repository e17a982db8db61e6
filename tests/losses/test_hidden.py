"""Cosine distance and CKA of hidden states, replicated and sequence parallel."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megaqad.losses import hidden_cka, hidden_cosine
from tests.losses.oracle import dense_cka, relative_error


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


def run_cka(rank: int, world_size: int, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    student, teacher, weights = states()
    wide = torch.cat([teacher, teacher[:, :5].square()], dim=-1)
    mine = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size) if sequence_parallel else slice(None)
    leaf = student[mine].clone().requires_grad_()
    group = dist.group.WORLD if world_size > 1 else None
    loss = hidden_cka(leaf, wide[mine], token_weights=weights, group=group, sequence_parallel=sequence_parallel)
    (2 * loss).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (3, True)])
def test_cka_of_different_widths(run_ranks, world_size: int, sequence_parallel: bool) -> None:
    student, teacher, weights = (x.double() for x in states())
    wide = torch.cat([teacher, teacher[:, :5].square()], dim=-1)
    leaf = student.clone().requires_grad_()
    true_loss = weights.sum() * (1 - dense_cka(leaf, wide, weights))
    (2 * true_loss).backward()
    ranks = run_ranks(world_size, run_cka, sequence_parallel) if world_size > 1 else [run_cka(0, 1, False)]
    for loss, _ in ranks:
        assert (loss - true_loss.detach()).abs() <= 1e-5
    gradient = torch.cat([rank[1] for rank in ranks]) if sequence_parallel else ranks[0][1]
    assert relative_error(gradient, leaf.grad) <= 1e-5


def test_cka_of_near_models_of_the_same_kind_and_of_nothing() -> None:
    _, teacher, _ = states()
    teacher[5] = 1.0
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    weights = torch.ones(12)
    assert hidden_cka(3 * teacher @ rotation + 7, teacher, token_weights=weights).abs() <= 1e-4
    near = (teacher + 1e-3 * teacher.roll(1, 0)).requires_grad_()
    hidden_cka(near, teacher, token_weights=weights).backward()
    leaf = near.detach().double().requires_grad_()
    (12 * (1 - dense_cka(leaf, teacher.double(), weights.double()))).backward()
    assert relative_error(near.grad, leaf.grad) <= 2e-3
    leaf = torch.ones(12, 16, requires_grad=True)
    nothing = hidden_cka(leaf, teacher, token_weights=torch.zeros(12))
    nothing.backward()
    assert nothing == 0
    assert (leaf.grad == 0).all()
    with pytest.raises(ValueError, match="of the same tokens"):
        hidden_cka(torch.zeros(4, 8), torch.zeros(5, 8), token_weights=torch.ones(4))
