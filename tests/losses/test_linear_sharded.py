"""Heads sharded over the vocabulary, hidden states replicated or sequence parallel: the dense losses and gradients."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megaqad.losses import linear_cross_entropy, linear_kl
from tests.losses.heads import Heads, differentiate, kl_truth, make_heads, share
from tests.losses.implementations import FAST_IMPLEMENTATIONS, IMPLEMENTATIONS
from tests.losses.oracle import assert_token_kl, relative_error
from tests.losses.tracing import collectives


def both_losses(rank: int, world_size: int, heads: Heads, sequence_parallel: bool, impl: str) -> list[list[Tensor]]:
    """[loss, token loss, hidden gradient, head gradient] of KL and of cross entropy."""
    results = []
    for name in ("kl", "cross_entropy"):
        mine = share(heads, rank, world_size, sequence_parallel)
        shared = {
            "token_weights": heads.weights,
            "group": mine.group,
            "sequence_parallel": sequence_parallel,
            "impl": impl,
        }
        if name == "kl":
            loss, token_loss = linear_kl(
                mine.student_hidden, mine.student_head, mine.teacher_hidden, mine.teacher_head, **shared
            )
        else:
            loss, token_loss = linear_cross_entropy(
                mine.student_hidden, mine.student_head, heads.labels, vocab_start=mine.vocab_start, **shared
            )
        loss.backward()
        results.append([loss.detach(), token_loss, mine.student_hidden.grad, mine.student_head.grad])
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sharded_heads(run_ranks, impl: str, world_size: int, sequence_parallel: bool) -> None:
    heads = make_heads(teacher_hidden=48)
    truths = [
        kl_truth(heads),
        differentiate(heads, lambda student, _, labels: F.cross_entropy(student, labels, reduction="none")),
    ]
    ranks = run_ranks(world_size, both_losses, heads, sequence_parallel, impl)
    for index, truth in enumerate(truths):
        loss, token_loss, hidden_gradient, _ = ranks[0][index]
        for other in ranks[1:]:
            assert torch.equal(other[index][0], loss)
            assert torch.equal(other[index][1], token_loss)
            if not sequence_parallel:
                assert torch.equal(other[index][2], hidden_gradient), "complete on every rank"
        if sequence_parallel:
            hidden_gradient = torch.cat([rank[index][2] for rank in ranks])
        assert_token_kl(token_loss, truth.token_loss)
        assert float((loss - truth.loss).abs()) <= 2e-6
        assert relative_error(hidden_gradient, truth.hidden_gradient) <= 3e-6
        assert relative_error(torch.cat([rank[index][3] for rank in ranks]), truth.head_gradient) <= 3e-6


def traced(rank: int, world_size: int, weights: Tensor, sequence_parallel: bool, frozen: bool) -> list[list]:
    heads = make_heads()
    mine = share(heads, rank, world_size, sequence_parallel)
    with collectives() as forward:
        loss, _ = linear_kl(
            mine.student_hidden.detach() if frozen else mine.student_hidden,
            mine.student_head,
            mine.teacher_hidden,
            mine.teacher_head,
            token_weights=weights,
            group=mine.group,
            sequence_parallel=sequence_parallel,
        )
    with collectives() as backward:
        loss.backward()
    return [forward, backward]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_all_ranks_issue_the_same_collectives(run_ranks, masked: bool, sequence_parallel: bool, frozen: bool) -> None:
    weights = torch.zeros(24) if masked else make_heads().weights
    ranks = run_ranks(3, traced, weights, sequence_parallel, frozen)
    forward, backward = ranks[0]
    assert ranks == [ranks[0]] * 3
    assert backward == []
    kinds = [kind for kind, _ in forward]
    gathered_hidden = ["all_gather"] * 2 if sequence_parallel else []
    chunk = [] if masked else ["all_gather"]
    reduced = [] if frozen else ["reduce_scatter" if sequence_parallel else "all_reduce"]
    assert kinds == ["all_gather", *gathered_hidden, *chunk, *reduced]
    if not masked:
        assert forward[len(kinds) - 1 - len(reduced)] == ("all_gather", 20 * 16)


def one_rank_frozen(rank: int, world_size: int) -> bool:
    """Ranks that disagree on who needs gradients must still not hang."""
    heads = make_heads()
    mine = share(heads, rank, world_size)
    loss, _ = linear_kl(
        mine.student_hidden if rank else mine.student_hidden.detach(),
        mine.student_head,
        mine.teacher_hidden,
        mine.teacher_head,
        token_weights=heads.weights,
        group=mine.group,
    )
    loss.backward()
    truth = kl_truth(heads)
    return rank == 0 or relative_error(mine.student_hidden.grad, truth.hidden_gradient) <= 3e-6


def test_gradients_needed_on_one_rank_only(run_ranks) -> None:
    assert run_ranks(2, one_rank_frozen) == [True, True]


def refused(rank: int, world_size: int, mistake: str) -> str:
    heads = make_heads()
    mine = share(heads, rank, world_size)
    weights, labels, start = heads.weights.clone(), heads.labels.clone(), mine.vocab_start
    head = mine.student_head
    if mistake == "weights" and rank == 1:
        weights[1] = 0
    if mistake == "start" and rank == 1:
        start += 1
    if mistake == "label":
        labels[1] = len(heads.student_head)
    if mistake == "head" and rank == 1:
        head = head[:, 1:]
    try:
        linear_cross_entropy(
            mine.student_hidden, head, labels, token_weights=weights, vocab_start=start, group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mistake", "messages"),
    [
        ("weights", ["token_weights differ between the ranks"] * 2),
        ("start", ["vocab_start is [0, 333] on the ranks, but their heads' rows start at [0, 332]"] * 2),
        ("label", ["outside the vocabulary of 997"] * 2),
        ("head", ["rank 1 of the group refused its arguments", "student hidden states (24, 32) and head (665, 31)"]),
    ],
)
def test_every_rank_refuses_together(run_ranks, mistake: str, messages: list[str]) -> None:
    for told, expected in zip(run_ranks(2, refused, mistake), messages, strict=True):
        assert expected in told
        assert "\n" not in told


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_bf16_shards(run_ranks, impl: str) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    truth = kl_truth(heads)
    ranks = run_ranks(2, both_losses, heads, False, impl)
    assert_token_kl(ranks[1][0][1], truth.token_loss)
    for rank in ranks:
        floor = relative_error(truth.hidden_gradient.bfloat16(), truth.hidden_gradient)
        assert relative_error(rank[0][2], truth.hidden_gradient) <= 1.5 * floor
