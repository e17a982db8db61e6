"""`linear_kl` and `linear_cross_entropy` on one rank: values, gradients, dtypes, and who takes part in what."""

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from megaqad.losses import gemm, inputs, linear_cross_entropy, linear_kl
from tests.losses.heads import Heads, differentiate, kl_truth, make_heads, share
from tests.losses.implementations import FAST_IMPLEMENTATIONS, IMPLEMENTATIONS
from tests.losses.oracle import assert_token_kl, relative_error


def call(heads: Heads, token_weights: torch.Tensor | None = None, **options):
    mine = share(heads, 0, 1)
    loss, token_kl = linear_kl(
        mine.student_hidden,
        mine.student_head,
        mine.teacher_hidden,
        mine.teacher_head,
        token_weights=heads.weights if token_weights is None else token_weights,
        **options,
    )
    return mine, loss, token_kl


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("teacher_hidden", [32, 48])
def test_kl_and_gradients(impl: str, temperature: float, teacher_hidden: int) -> None:
    heads = make_heads(teacher_hidden=teacher_hidden)
    truth = kl_truth(heads, temperature)
    mine, loss, token_kl = call(heads, temperature=temperature, impl=impl)
    loss.backward(torch.tensor(0.5))
    assert loss.dtype == token_kl.dtype == torch.float32
    assert loss.shape == ()
    assert not token_kl.requires_grad
    assert_token_kl(token_kl, truth.token_loss)
    assert float((loss.detach() - truth.loss).abs()) <= 2e-6
    assert relative_error(mine.student_hidden.grad, 0.5 * truth.hidden_gradient) <= 3e-6
    assert relative_error(mine.student_head.grad, 0.5 * truth.head_gradient) <= 3e-6
    assert (mine.student_hidden.grad[heads.weights == 0] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cross_entropy_and_gradients(impl: str) -> None:
    heads = make_heads()
    truth = differentiate(heads, lambda student, _, labels: F.cross_entropy(student, labels, reduction="none"))
    mine = share(heads, 0, 1)
    loss, token_loss = linear_cross_entropy(
        mine.student_hidden, mine.student_head, heads.labels, token_weights=heads.weights, vocab_start=0, impl=impl
    )
    loss.backward()
    assert_token_kl(token_loss, truth.token_loss)
    assert relative_error(mine.student_hidden.grad, truth.hidden_gradient) <= 3e-6
    assert relative_error(mine.student_head.grad, truth.head_gradient) <= 3e-6


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_many_chunks_are_one_loss(impl: str) -> None:
    heads = make_heads(tokens=301)
    truth = kl_truth(heads)
    with mock.patch.object(inputs, "_SMALLEST_CHUNK", 16), mock.patch.object(inputs, "_CPU_BUDGET", 1):
        mine, loss, token_kl = call(heads, impl=impl)
    loss.backward()
    assert_token_kl(token_kl, truth.token_loss)
    assert relative_error(mine.student_hidden.grad, truth.hidden_gradient) <= 3e-6
    assert relative_error(mine.student_head.grad, truth.head_gradient) <= 3e-6


def test_chunks_are_derived_and_even() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert inputs.chunk_tokens(100, 32000, cpu) == 100
    assert inputs.chunk_tokens(8192, 32000, cpu) == 1024
    assert inputs.chunk_tokens(8192, 248320, cpu) == 512, "a chunk of fewer tokens wastes a pass over the head"
    assert inputs.chunk_tokens(1100, 32000, cpu) == 550, "two equal chunks, not one of 1048 and one of 52"
    assert inputs.chunk_tokens(32768, 19000, cuda) == 4096
    assert inputs.chunk_tokens(0, 32000, cpu) == 1


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_bf16_gradients_are_rounded_twice(impl: str) -> None:
    """Once as the logits' gradient, before the products, and once as the result; nothing is lost between."""
    heads = make_heads(dtype=torch.bfloat16)
    truth = kl_truth(heads)
    mine, loss, token_kl = call(heads, impl=impl)
    (loss / 3).backward()
    assert mine.student_hidden.grad.dtype == mine.student_head.grad.dtype == torch.bfloat16
    assert_token_kl(token_kl, truth.token_loss)
    for gradient, true in (
        (mine.student_hidden.grad, truth.hidden_gradient),
        (mine.student_head.grad, truth.head_gradient),
    ):
        assert relative_error(gradient, true / 3) <= 1.5 * relative_error((true / 3).bfloat16(), true / 3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_head_gradient_is_added_to_the_main_gradient_in_fp32(impl: str) -> None:
    heads = make_heads(dtype=torch.bfloat16)
    truth = kl_truth(heads)
    main_grad = torch.full(heads.student_head.shape, 0.25)
    mine, loss, _ = call(heads, accumulate_into=main_grad, impl=impl)
    assert (main_grad == 0.25).all(), "nothing arrives before backward"
    (3 * loss).backward()
    assert mine.student_head.grad is None
    assert relative_error(main_grad - 0.25, 3 * truth.head_gradient) <= 3e-3, "in BF16, 0.25 would swallow it"
    assert relative_error(mine.student_hidden.grad, 3 * truth.hidden_gradient) <= 4e-3


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_tied_embedding_gets_both_gradients(impl: str) -> None:
    heads = make_heads()
    truth = kl_truth(heads)
    embedding = heads.student_head.clone().requires_grad_()
    hidden = heads.student_hidden + 0 * F.embedding(heads.labels.clamp(min=0), embedding)
    loss, _ = linear_kl(
        hidden, embedding, heads.teacher_hidden, heads.teacher_head, token_weights=heads.weights, impl=impl
    )
    (loss + embedding[:5].sum()).backward()
    expected = truth.head_gradient.clone()
    expected[:5] += 1
    assert relative_error(embedding.grad, expected) <= 3e-6


class ProductsInFP32:
    """Stands for what gives FP32 products of BF16 operands, which few CPUs have."""

    serves = staticmethod(lambda width: True)
    logits_ = staticmethod(lambda out, hidden, head: out.copy_(hidden.float() @ head.float().t()))
    hidden_gradient = staticmethod(lambda slope, head: slope.float() @ head.float())

    @staticmethod
    def head_gradient(total, slope, hidden):
        made = slope.float().t() @ hidden.float()
        return made if total is None else total.add_(made)


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [5, 1000])
def test_gradients_of_logits_in_bfloat16(impl: str, size: int) -> None:
    """In the memory of logits that were read already, or beside them; in several chunks and in one."""
    heads = make_heads(dtype=torch.bfloat16)
    truth = kl_truth(heads)
    with (
        mock.patch.object(gemm, "products", ProductsInFP32),
        mock.patch.object(inputs, "chunk_tokens", return_value=size),
    ):
        mine, loss, token_kl = call(heads, impl=impl)
        loss.backward()
    assert_token_kl(token_kl, truth.token_loss)
    assert relative_error(mine.student_hidden.grad, truth.hidden_gradient) <= 5e-3
    assert relative_error(mine.student_head.grad, truth.head_gradient) <= 5e-3


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("hidden_grad", "head_grad", "products"),
    [(True, True, [1, 1]), (True, False, [1, 0]), (False, True, [0, 1]), (False, False, [0, 0])],
)
def test_only_the_gradients_asked_for_are_computed(impl: str, hidden_grad: bool, head_grad: bool, products) -> None:
    heads = make_heads()
    truth = kl_truth(heads)
    hidden = heads.student_hidden.clone().requires_grad_(hidden_grad)
    head = heads.student_head.clone().requires_grad_(head_grad)
    with (
        mock.patch.object(gemm, "hidden_gradient", wraps=gemm.hidden_gradient) as into_hidden,
        mock.patch.object(gemm, "head_gradient", wraps=gemm.head_gradient) as into_head,
    ):
        loss, token_kl = linear_kl(
            hidden, head, heads.teacher_hidden, heads.teacher_head, token_weights=heads.weights, impl=impl
        )
        assert [into_hidden.call_count, into_head.call_count] == products
        with torch.no_grad():
            again, _ = linear_kl(
                hidden, head, heads.teacher_hidden, heads.teacher_head, token_weights=heads.weights, impl=impl
            )
        assert [into_hidden.call_count, into_head.call_count] == products
    assert_token_kl(token_kl, truth.token_loss)
    assert torch.equal(loss, again)
    assert loss.requires_grad == (hidden_grad or head_grad)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None, head.grad is not None) == (hidden_grad, head_grad)


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_ignored_tokens_leave_the_products(impl: str) -> None:
    heads = make_heads(tokens=300)
    with (
        mock.patch.object(gemm, "logits_", wraps=gemm.logits_) as logits,
        mock.patch.object(gemm, "hidden_gradient", wraps=gemm.hidden_gradient) as into_hidden,
        mock.patch.object(gemm, "head_gradient", wraps=gemm.head_gradient) as into_head,
    ):
        _, loss, _ = call(heads, impl=impl)
        loss.backward()
    rows = [made.args[1].shape[0] for made in logits.call_args_list]
    assert sum(rows) == 2 * int((heads.weights != 0).sum()) == 400
    assert sum(made.args[0].shape[0] for made in into_hidden.call_args_list) == 200
    assert sum(made.args[1].shape[0] for made in into_head.call_args_list) == 200


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_tokens_ignored(impl: str) -> None:
    heads = make_heads()
    mine, loss, token_kl = call(heads, torch.zeros_like(heads.weights), impl=impl)
    loss.backward()
    assert loss == 0
    assert (token_kl == 0).all()
    assert (mine.student_hidden.grad == 0).all()
    assert (mine.student_head.grad == 0).all()


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_a_second_backward_is_refused(impl: str) -> None:
    _, loss, _ = call(make_heads(), impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


def test_equal_models_have_no_gradient() -> None:
    heads = make_heads(noise=0.0)
    mine, loss, _ = call(heads)
    loss.backward()
    assert loss.detach().abs() <= 1e-12
    assert (mine.student_hidden.grad == 0).all()
    assert (mine.student_head.grad == 0).all()
