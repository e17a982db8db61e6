"""For any logits and any cut of the vocabulary: shards merge to the dense result, and KL behaves as a divergence."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqad.losses import blocks, kl, native, vocab_parallel_kl
from megaqad.nvfp4 import fake_quantize
from tests.losses.heads import make_heads
from tests.losses.implementations import WITHOUT_COMPILER
from tests.losses.oracle import dense_kl, dense_kl_and_gradient

KERNELS = [blocks] if WITHOUT_COMPILER else [blocks, native]
CUTS = st.lists(st.integers(0, 97), max_size=6)
SEEDS = st.integers(0, 10**6)
FEW = settings(max_examples=60, deadline=None)


@FEW
@given(cuts=CUTS, seed=SEEDS, size=st.sampled_from([0.1, 3.0, 100.0]), temperature=st.sampled_from([0.7, 1.0, 4.0]))
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda module: module.__name__.split(".")[-1])
def test_any_cut_of_the_vocabulary(kernel, cuts: list[int], seed: int, size: float, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(3, 97, generator=draw) for _ in range(2))
    student[0, ::7] = teacher[0, ::7] = -torch.inf
    edges = [0, *sorted(cuts), 97]
    shards = [slice(first, last) for first, last in pairwise(edges)]
    local = [kernel.statistics(student[:, s], teacher[:, s], temperature=temperature) for s in shards]
    sums = blocks.merge(torch.stack(local).float(), temperature=temperature)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, torch.ones(3), temperature)
    assert ((sums.token_kl - true_kl).abs() <= 2e-6 + 1e-6 * true_kl).all()
    factors = kl.factors(sums.sums, torch.ones(3), temperature)
    gradient = torch.cat(
        [
            kernel.gradient(
                student[:, s],
                teacher[:, s],
                peaks=sums.peaks,
                factors=factors,
                temperature=temperature,
                out=torch.empty_like(student[:, s]),
            )
            for s in shards
        ],
        dim=1,
    )
    assert (gradient - true_gradient).abs().max() <= 2e-6 / temperature


@FEW
@given(seed=SEEDS, shift=st.floats(-1e4, 1e4, width=32), scale=st.floats(0.0, 10.0))
def test_a_divergence(seed: int, shift: float, scale: float) -> None:
    """Not negative, zero between equals, blind to a common offset, its gradient adds up to zero."""
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 200, generator=draw)
    student = (teacher + scale * torch.randn(4, 200, generator=draw)).requires_grad_()
    token_kl = vocab_parallel_kl(student, teacher)
    token_kl.sum().backward()
    assert (token_kl >= -1e-6).all()
    assert student.grad.double().sum(-1).abs().max() <= 1e-5
    shifted = student.detach() + shift
    again = vocab_parallel_kl(shifted, teacher)
    # the offset itself rounds the logits: what is compared is what was given
    torch.testing.assert_close(again.double(), dense_kl(shifted, teacher), rtol=1e-6, atol=2e-6)


def test_a_quantized_head_passes_its_gradient_on() -> None:
    """The student's head as training uses it: fake-quantized, the gradient straight through to the weights behind."""
    from megaqad.losses import linear_kl

    heads = make_heads(vocabulary=320)
    master = heads.student_head.clone().requires_grad_()
    quantized = fake_quantize(master)
    assert not torch.equal(quantized, master)
    plain = quantized.detach().clone().requires_grad_()
    for head in (quantized, plain):
        loss, _ = linear_kl(
            heads.student_hidden, head, heads.teacher_hidden, heads.teacher_head, token_weights=heads.weights
        )
        loss.backward()
    assert torch.equal(master.grad, plain.grad)
    assert plain.grad.abs().max() > 0
