"""`compare_heads` against dense FP64 metrics, sharded and not; ties; memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaqad.losses import compare_heads
from tests.losses.heads import Heads, make_heads, share
from tests.losses.oracle import assert_token_kl, dense_kl


def metrics(rank: int, world_size: int, heads: Heads, sequence_parallel: bool) -> list[Tensor]:
    mine = share(heads, rank, world_size, sequence_parallel)
    result = compare_heads(
        mine.student_hidden,
        mine.student_head,
        mine.teacher_hidden,
        mine.teacher_head,
        heads.labels,
        token_weights=heads.weights,
        vocab_start=mine.vocab_start,
        group=mine.group,
        sequence_parallel=sequence_parallel,
    )
    return [result.kl, result.student_cross_entropy, result.teacher_cross_entropy, result.top1_agreement]


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (3, True), (4, True)])
def test_metrics(run_ranks, world_size: int, sequence_parallel: bool) -> None:
    heads = make_heads(teacher_hidden=48, noise=0.6)
    ranks = (
        [metrics(0, 1, heads, False)] if world_size == 1 else run_ranks(world_size, metrics, heads, sequence_parallel)
    )
    keep = heads.weights != 0
    student = heads.student_hidden[keep].double() @ heads.student_head.double().t()
    teacher = heads.teacher_hidden[keep].double() @ heads.teacher_head.double().t()
    expected = [
        dense_kl(student, teacher),
        F.cross_entropy(student, heads.labels[keep], reduction="none"),
        F.cross_entropy(teacher, heads.labels[keep], reduction="none"),
    ]
    agreement = student.argmax(-1) == teacher.argmax(-1)
    assert 0 < agreement.sum() < len(agreement), "the case must tell agreement from disagreement"
    for values in ranks:
        for value, truth in zip(values, expected, strict=False):
            assert value.dtype == torch.float32
            assert_token_kl(value[keep], truth)
            assert (value[~keep] == 0).all()
        assert values[3].dtype == torch.bool
        assert torch.equal(values[3][keep], agreement)
        assert not values[3][~keep].any()


def tied(rank: int, world_size: int) -> list[bool]:
    """Tokens 0 and 1 of the vocabulary tie across the shard boundary."""
    head = torch.zeros(6, 4)
    head[1, 0] = head[4, 0] = 1.0  # student: ids 1 and 4 tie, on different shards
    head_t = torch.zeros(6, 4)
    head_t[4, 0] = head_t[5, 0] = 1.0  # teacher, token 0: ids 4 and 5 tie
    head_t[1, 1] = head_t[3, 1] = 1.0  # teacher, token 1: ids 1 and 3 tie, on different shards
    rows = slice(rank * 3, rank * 3 + 3) if world_size > 1 else slice(None)
    student = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    teacher = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    result = compare_heads(
        student,
        head[rows],
        teacher,
        head_t[rows],
        torch.zeros(2, dtype=torch.int64),
        token_weights=torch.ones(2),
        vocab_start=rank * 3,
        group=torch.distributed.group.WORLD if world_size > 1 else None,
    )
    return result.top1_agreement.tolist()


def test_ties_go_to_the_lowest_id_on_every_rank(run_ranks) -> None:
    assert tied(0, 1) == [False, True]
    assert run_ranks(2, tied) == [[False, True]] * 2
