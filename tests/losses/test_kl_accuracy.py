"""`vocab_parallel_kl` on one rank against FP64: the error bars, and the inputs that break other implementations."""

import pytest
import torch
from torch import Tensor

from megaqad.losses import vocab_parallel_kl
from tests.losses.implementations import IMPLEMENTATIONS
from tests.losses.oracle import assert_token_kl, dense_kl_and_gradient, logit_pair, relative_error

LARGE_VOCABULARY = 151936
pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def run(student: Tensor, teacher: Tensor, scale: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    token_kl = vocab_parallel_kl(leaf, teacher, **options)
    assert token_kl.dtype == torch.float32
    assert token_kl.shape == student.shape[:1]
    (token_kl * scale).sum().backward()
    return token_kl.detach(), leaf.grad


def random_scale(tokens: int) -> Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(9)) + 0.5


@pytest.mark.parametrize(
    ("noise", "kl", "gradient_bound"),
    [(0.05, 1.25e-3, 3e-5), (1.4, 1.0, 5e-7), (4.0, 7.5, 5e-7)],
    ids=["close", "one", "unrelated"],
)
def test_fp32_errors_at_a_large_vocabulary(impl: str, noise: float, kl: float, gradient_bound: float) -> None:
    student, teacher = logit_pair(8, LARGE_VOCABULARY, noise)
    scale = random_scale(8)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, scale)
    assert float(true_kl.mean()) == pytest.approx(kl, rel=0.05)
    token_kl, gradient = run(student, teacher, scale, impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert relative_error(gradient, true_gradient) <= gradient_bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_divides_logits_and_gradient(impl: str, temperature: float) -> None:
    student, teacher = logit_pair(17, 5003, 1.5)
    scale = random_scale(17)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, scale, temperature)
    token_kl, gradient = run(student, teacher, scale, temperature=temperature, impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert relative_error(gradient, true_gradient) <= 3e-5


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_bf16_gradient_is_the_rounded_true_gradient(impl: str, noise: float) -> None:
    student, teacher = logit_pair(8, 32001, noise, torch.bfloat16)
    scale = random_scale(8)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, scale)
    token_kl, gradient = run(student, teacher, scale, impl=impl)
    assert gradient.dtype == torch.bfloat16
    assert_token_kl(token_kl, true_kl)
    floor = relative_error(true_gradient.bfloat16(), true_gradient)
    assert relative_error(gradient, true_gradient) <= 1.01 * floor


def test_row_offsets_of_1e4_cancel(impl: str) -> None:
    student, teacher = logit_pair(8, 20011, 0.05)
    offset = torch.linspace(-1e4, 1e4, 8).unsqueeze(1)
    student, teacher, scale = student + offset, teacher - offset, random_scale(8)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, scale)
    token_kl, gradient = run(student, teacher, scale, impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert relative_error(gradient, true_gradient) <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_spikes_of_1e4(impl: str, temperature: float) -> None:
    student, teacher = logit_pair(8, 20011, 1.0)
    student[:, 5], teacher[:, 5] = 1e4, 1e4 + 1  # both certain of one token
    student[3:, 77], teacher[3:, 77] = 1e4 - 0.5, 1e4 + 0.25
    student[:, 99] = teacher[:, 98] = -1e4
    scale = random_scale(8)
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, scale, temperature)
    token_kl, gradient = run(student, teacher, scale, temperature=temperature, impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert (gradient - true_gradient).abs().max() <= 1e-6
    assert relative_error(gradient[3:], true_gradient[3:]) <= 1e-4


def test_logits_of_magnitude_1e4_give_a_kl_of_1e4(impl: str) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (1e4 * torch.randn(8, 4001, generator=generator) for _ in range(2))
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, torch.ones(8))
    token_kl, gradient = run(student, teacher, torch.ones(8), impl=impl)
    assert true_kl.max() > 1e4
    assert ((token_kl - true_kl).abs() / true_kl).max() <= 1e-6
    assert (gradient - true_gradient).abs().max() <= 1e-6


def test_padding_columns_of_minus_infinity(impl: str) -> None:
    student, teacher = logit_pair(8, 5000, 0.3)
    true_kl, true_gradient = dense_kl_and_gradient(student[:, :4500], teacher[:, :4500], torch.ones(8))
    student[:, 4500:], teacher[:, 4500:] = -torch.inf, -torch.inf
    token_kl, gradient = run(student, teacher, torch.ones(8), impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert relative_error(gradient[:, :4500], true_gradient) <= 3e-5
    assert (gradient[:, 4500:] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_ignored_tokens_may_hold_anything(impl: str, poison: float) -> None:
    student, teacher = logit_pair(9, 4099, 0.3)
    keep = torch.arange(9) % 3 != 0
    true_kl, true_gradient = dense_kl_and_gradient(student, teacher, keep.float())
    student[~keep], teacher[~keep] = poison, poison
    token_kl, gradient = run(student, teacher, torch.ones(9), token_mask=keep, impl=impl)
    assert_token_kl(token_kl, true_kl)
    assert (token_kl[~keep] == 0).all()
    assert (gradient[~keep] == 0).all()
    assert relative_error(gradient, true_gradient) <= 3e-5


def test_a_token_without_incoming_gradient_gets_zero_even_if_it_is_nan(impl: str) -> None:
    if impl == "reference":
        pytest.skip("autograd multiplies by the incoming 0, and 0 * NaN is NaN; the reference wants a token_mask")
    student, teacher = logit_pair(4, 600, 0.3)
    student[2] = torch.nan
    leaf = student.clone().requires_grad_()
    token_kl = vocab_parallel_kl(leaf, teacher, impl=impl)
    token_kl[[0, 1, 3]].sum().backward()
    assert token_kl[2].isnan()
    assert (leaf.grad[2] == 0).all()
    assert leaf.grad[0].isfinite().all()


def test_all_tokens_masked(impl: str) -> None:
    student = teacher = torch.full((5, 300), torch.nan)
    token_kl, gradient = run(student, teacher, torch.ones(5), token_mask=torch.zeros(5, dtype=torch.bool), impl=impl)
    assert (token_kl == 0).all()
    assert (gradient == 0).all()


def test_equal_logits_have_no_kl_and_no_gradient(impl: str) -> None:
    student, _ = logit_pair(4, 9001, 0.0)
    token_kl, gradient = run(student, student.clone(), torch.ones(4), impl=impl)
    assert token_kl.abs().max() <= 1e-12
    # exactly 0 from the fast ones: Adam makes a full step of the smallest rounding error
    assert gradient.abs().max() <= (1e-16 if impl == "reference" else 0.0)


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_in_a_counted_token_is_seen_in_that_token_alone(impl: str, where: str) -> None:
    student, teacher = logit_pair(4, 5000, 0.3)
    (student if where == "student" else teacher)[1, 4321] = torch.nan
    token_kl = vocab_parallel_kl(student, teacher, impl=impl)
    assert token_kl.isnan().tolist() == [False, True, False, False]


def test_no_tokens(impl: str) -> None:
    token_kl, gradient = run(torch.zeros(0, 50), torch.zeros(0, 50), torch.zeros(0), impl=impl)
    assert token_kl.shape == (0,)
    assert gradient.shape == (0, 50)


def test_strided_logits(impl: str) -> None:
    student, teacher = logit_pair(6, 4000, 0.3)
    expected = run(student[:, 1::2].contiguous(), teacher[:, 1::2].contiguous(), torch.ones(6), impl=impl)
    token_kl = vocab_parallel_kl(student[:, 1::2], teacher[:, 1::2], impl=impl)
    torch.testing.assert_close(token_kl, expected[0], rtol=1e-6, atol=1e-6)
