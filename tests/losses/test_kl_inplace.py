"""Writing the gradient over the logits: the same numbers, no extra memory, and never a silently wrong gradient."""

import pytest
import torch

from megaqad.losses import vocab_parallel_kl
from tests.losses.implementations import FAST_IMPLEMENTATIONS
from tests.losses.oracle import logit_pair

pytestmark = pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_gradient_in_the_logits_own_storage(impl: str, dtype: torch.dtype) -> None:
    student, teacher = logit_pair(7, 4500, 0.5, dtype)
    apart, over = student.clone().requires_grad_(), student.clone().requires_grad_()
    vocab_parallel_kl(apart, teacher, impl=impl).sum().backward()
    vocab_parallel_kl(over, teacher, inplace=True, impl=impl).sum().backward()
    torch.testing.assert_close(over.grad, apart.grad, rtol=0, atol=0)
    assert over.grad.data_ptr() == over.data_ptr()
    assert apart.grad.data_ptr() != apart.data_ptr()


def test_the_gradient_flows_on_through_a_producer_that_does_not_need_its_output(impl: str) -> None:
    hidden, head = torch.randn(7, 16), torch.randn(4500, 16)
    _, teacher = logit_pair(7, 4500, 0.5)
    gradients = []
    for inplace in (False, True):
        leaf = hidden.clone().requires_grad_()
        vocab_parallel_kl(leaf @ head.t(), teacher, inplace=inplace, impl=impl).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_producer_that_saved_its_output_fails_loudly(impl: str) -> None:
    raw, teacher = logit_pair(7, 4500, 0.5)
    raw.requires_grad_()
    capped = 30 * torch.tanh(raw / 30)
    vocab_parallel_kl(capped, teacher, inplace=False, impl=impl).sum().backward()
    assert raw.grad.isfinite().all()
    loss = vocab_parallel_kl(torch.tanh(raw), teacher, inplace=True, impl=impl).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_version_is_raised(impl: str) -> None:
    student, teacher = logit_pair(7, 4500, 0.5)
    student.requires_grad_()
    loss = vocab_parallel_kl(student, teacher, inplace=True, impl=impl).sum()
    before = student._version
    loss.backward()
    assert student._version > before
