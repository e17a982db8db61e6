"""Every objective against its dense FP64 definition, sharded and not, and against -inf padding and small blocks."""

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaqad.losses import (
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    Mixture,
    ReverseKL,
    blocks,
    build_objective,
    kernels,
    linear_divergence,
)
from megaqad.losses.objectives.base import ALL, Chunk
from tests.losses.heads import Heads, differentiate, make_heads, share
from tests.losses.implementations import FAST_IMPLEMENTATIONS, NATIVE, TRITON, with_layout
from tests.losses.oracle import assert_token_kl, dense_kl, relative_error
from tests.losses.tracing import collectives


def dense_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    p_s, p_t = (torch.softmax(z.double() / temperature, -1) for z in (student, teacher))
    mixture = (beta * p_t + (1 - beta) * p_s).log()
    return beta * F.kl_div(mixture, p_t, reduction="none").sum(-1) + (1 - beta) * F.kl_div(
        mixture, p_s, reduction="none"
    ).sum(-1)


def dense_cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.double(), labels, reduction="none")


OBJECTIVES = {
    "forward_kl": (ForwardKL(1.7), lambda s, t, y: dense_kl(s, t, 1.7)),
    "reverse_kl": (ReverseKL(1.7), lambda s, t, y: dense_kl(t, s, 1.7)),
    "jsd": (JensenShannon(0.5, 1.7), lambda s, t, y: dense_jsd(s, t, 1.7, 0.5)),
    "jsd_skewed": (JensenShannon(0.1), lambda s, t, y: dense_jsd(s, t, 1.0, 0.1)),
    "logit_mse": (LogitMSE(1.7), lambda s, t, y: ((s - t) / 1.7).square().mean(-1)),
    "cross_entropy": (CrossEntropy(), lambda s, t, y: dense_cross_entropy(s, y)),
    "mixture": (
        build_objective({"forward_kl": 0.7, "jsd": 2.0, "cross_entropy": 0.3, "logit_mse": 0.0}, temperature=2.0),
        lambda s, t, y: 0.7 * dense_kl(s, t, 2.0) + 2.0 * dense_jsd(s, t, 2.0, 0.5) + 0.3 * dense_cross_entropy(s, y),
    ),
}


def run_objective(rank: int, world_size: int, name: str, heads: Heads, *options) -> tuple[Tensor, ...]:
    objective, _ = OBJECTIVES[name]
    sequence_parallel, impl = options
    mine = share(heads, rank, world_size, sequence_parallel)
    loss, token_loss = linear_divergence(
        mine.student_hidden,
        mine.student_head,
        mine.teacher_hidden,
        mine.teacher_head,
        objective=objective,
        token_weights=heads.weights,
        labels=heads.labels,
        vocab_start=mine.vocab_start,
        group=mine.group,
        sequence_parallel=sequence_parallel,
        impl=impl,
    )
    loss.backward()
    return loss.detach(), token_loss, mine.student_hidden.grad, mine.student_head.grad


LAYOUTS = [(1, False), (2, False), (3, True), (4, False)]
SLOW_LAYOUTS = [(1, False), (3, True)]


@pytest.mark.parametrize(
    ("impl", "world_size", "sequence_parallel"),
    [("reference", *layout) for layout in SLOW_LAYOUTS]
    + [("torch", *layout) for layout in LAYOUTS]
    + [with_layout(NATIVE, layout) for layout in LAYOUTS]
    + [with_layout(TRITON, layout) for layout in SLOW_LAYOUTS],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients(run_ranks, impl: str, name: str, world_size: int, sequence_parallel: bool) -> None:
    heads = make_heads(teacher_hidden=48, noise=0.5)
    truth = differentiate(heads, OBJECTIVES[name][1])
    arguments = (name, heads, sequence_parallel, impl)
    ranks = [run_objective(0, 1, *arguments)] if world_size == 1 else run_ranks(world_size, run_objective, *arguments)
    loss, token_loss, hidden_gradient, _ = ranks[-1]
    if sequence_parallel:
        hidden_gradient = torch.cat([rank[2] for rank in ranks])
    assert_token_kl(token_loss, truth.token_loss)
    assert (loss - truth.loss).abs() <= 2e-6
    assert relative_error(hidden_gradient, truth.hidden_gradient) <= 3e-6
    assert relative_error(torch.cat([rank[3] for rank in ranks]), truth.head_gradient) <= 3e-6


def evaluate(objective, student: Tensor, teacher: Tensor, labels: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient of logits that exist already, through the same moves as the engine."""
    kernel = kernels.choose(impl, student.device, {torch.float32})
    evaluation = objective.open(Chunk(student, teacher, labels), kernel)
    for _ in range(evaluation.rounds):
        evaluation.merge(evaluation.local().unsqueeze(0))
    gradient = student.clone()
    evaluation.gradient(ALL, torch.ones(len(student), dtype=torch.float64), out=gradient)
    return evaluation.loss, gradient


def true_gradient(name: str, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.double().requires_grad_()
    loss = OBJECTIVES[name][1](leaf, teacher.double(), labels)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_padding_columns_do_not_count(impl: str, name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(6, 5000, generator=draw)
    student, labels = teacher + 0.5 * torch.randn(6, 5000, generator=draw), torch.arange(6)
    loss, gradient = true_gradient(name, student[:, :4600], teacher[:, :4600], labels)
    student[:, 4600:] = teacher[:, 4600:] = -torch.inf
    with mock.patch.object(blocks, "_BLOCK_ELEMENTS", 12000):  # blocks of two tokens
        value, slope = evaluate(OBJECTIVES[name][0], student, teacher, labels, impl)
    assert_token_kl(value, loss)
    assert relative_error(slope[:, :4600], gradient) <= 3e-6
    assert (slope[:, 4600:] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_the_gradient_may_be_written_over_the_student(impl: str, name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(6, 3001, generator=draw)
    student, labels = teacher + 0.5 * torch.randn(6, 3001, generator=draw), torch.arange(6)
    _, expected = evaluate(OBJECTIVES[name][0], student, teacher, labels, impl)
    evaluation = OBJECTIVES[name][0].open(
        Chunk(student, teacher, labels), kernels.choose(impl, student.device, {torch.float32})
    )
    for _ in range(evaluation.rounds):
        evaluation.merge(evaluation.local().unsqueeze(0))
    with mock.patch.object(blocks, "_BLOCK_ELEMENTS", 6100):
        evaluation.gradient(ALL, torch.ones(6, dtype=torch.float64), out=student)
    assert torch.equal(student, expected)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "mixture"])
@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_a_large_vocabulary_and_a_close_student(impl: str, name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(4, 151936, generator=draw)
    student, labels = teacher + 0.05 * torch.randn(4, 151936, generator=draw), torch.arange(4)
    loss, gradient = true_gradient(name, student, teacher, labels)
    value, slope = evaluate(OBJECTIVES[name][0], student, teacher, labels, impl)
    assert_token_kl(value, loss)
    assert relative_error(slope, gradient) <= 3e-5


def traced_objective(rank: int, world_size: int, name: str) -> list[str]:
    with collectives() as seen:
        run_objective(rank, world_size, name, make_heads(teacher_hidden=48), False, "torch")
    return [kind for kind, _ in seen]


@pytest.mark.parametrize(("name", "rounds"), [("logit_mse", 1), ("jsd", 2), ("mixture", 2)])
def test_statistics_of_all_parts_travel_together(run_ranks, name: str, rounds: int) -> None:
    expected = ["all_gather"] * (1 + rounds) + ["all_reduce"]
    assert run_ranks(2, traced_objective, name) == [expected] * 2


def test_build_objective() -> None:
    assert build_objective({"forward_kl": 1.0}, temperature=2.0) == ForwardKL(2.0)
    assert build_objective({"forward_kl": 1.0, "cross_entropy": 0.0}) == ForwardKL(1.0)
    halves = build_objective({"jsd": 0.5, "cross_entropy": 0.5}, beta=0.3)
    assert halves == Mixture(((0.5, JensenShannon(0.3)), (0.5, CrossEntropy())))
    assert (halves.needs_teacher, halves.needs_labels) == (True, True)
    alone = build_objective({"cross_entropy": 2.0})
    assert (alone.needs_teacher, alone.needs_labels) == (False, True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_objective({"kl": 1.0}), "objective 'kl' does not exist; choose among forward_kl, reverse_kl"),
        (lambda: build_objective({"forward_kl": 0.0}), "at least one part"),
        (lambda: JensenShannon(0.0), "beta=0.0 must lie between 0 and 1"),
        (lambda: ReverseKL(-1.0), "temperature=-1.0"),
        (lambda: LogitMSE(0.0), "temperature=0.0"),
    ],
)
def test_settings_that_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "missing"), [("forward_kl", "teacher"), ("cross_entropy", "labels")])
def test_what_an_objective_needs_must_be_given(name: str, missing: str) -> None:
    heads = make_heads()
    with pytest.raises(ValueError, match=missing):
        linear_divergence(
            heads.student_hidden,
            heads.student_head,
            None,
            None,
            objective=OBJECTIVES[name][0],
            token_weights=heads.weights,
        )
