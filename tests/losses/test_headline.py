"""Why the loss takes hidden states: BF16 logits, which every loss that receives logits gets, spoil the KL gradient.

BF16 weights and hidden states, a student close to its teacher; the truth is FP64 from the same BF16 numbers. The same
run shows `linear_kl` and ModelOpt's `LogitsKLLoss` fed by the BF16 heads, as Megatron-Core's output layer feeds it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megaqad.losses import linear_kl
from tests.losses.heads import Heads, Truth, kl_truth
from tests.losses.implementations import FAST_IMPLEMENTATIONS
from tests.losses.oracle import relative_error

TOKENS, VOCABULARY, HIDDEN = 64, 16000, 512


def close_models(logit_std: float, noise: float) -> Heads:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    head = torch.randn(VOCABULARY, HIDDEN, generator=draw) * logit_std / HIDDEN**0.5
    student = hidden + noise * torch.randn(TOKENS, HIDDEN, generator=draw)
    return Heads(
        student.bfloat16(),
        head.bfloat16(),
        hidden.bfloat16(),
        head.bfloat16(),
        torch.zeros(TOKENS, dtype=torch.int64),
        torch.full((TOKENS,), 1.0 / TOKENS),
    )


def errors(loss: Tensor, hidden: Tensor, head: Tensor, truth: Truth) -> tuple[float, float, float]:
    """Relative loss bias, error of the hidden states' gradient, error of the head's gradient."""
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    bias = float(loss.detach() / truth.loss - 1)
    return bias, relative_error(hidden.grad, truth.hidden_gradient), relative_error(head.grad, truth.head_gradient)


def modelopt_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over tokens of ModelOpt's loss; Megatron's layout is [s, b, V]."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    criterion = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))
    token_kl, _, _ = criterion(student_logits.unsqueeze(1), teacher_logits.unsqueeze(1))
    return token_kl.mean()


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
@pytest.mark.parametrize(("logit_std", "noise"), [(2.0, 0.04), (5.0, 0.018)])
def test_gradient_error_and_bias(impl: str, logit_std: float, noise: float) -> None:
    heads = close_models(logit_std, noise)
    truth = kl_truth(heads)
    assert 1e-3 <= truth.loss <= 2e-2

    hidden, head = heads.student_hidden.clone().requires_grad_(), heads.student_head.clone().requires_grad_()
    loss, _ = linear_kl(hidden, head, heads.teacher_hidden, heads.teacher_head, token_weights=heads.weights, impl=impl)
    bias, hidden_error, head_error = errors(loss, hidden, head, truth)
    print(f"megaqad KL {float(truth.loss):.1e} bias {bias:+.1e} gradients {hidden_error:.1e} {head_error:.1e}")
    assert abs(bias) <= 1e-4
    assert max(hidden_error, head_error) <= 5e-3

    hidden, head = heads.student_hidden.clone().requires_grad_(), heads.student_head.clone().requires_grad_()
    loss = modelopt_loss(hidden @ head.t(), heads.teacher_hidden @ heads.teacher_head.t())
    bias, hidden_error, head_error = errors(loss, hidden, head, truth)
    print(f"ModelOpt             bias {bias:+.1e} gradients {hidden_error:.1e} {head_error:.1e}")
    assert abs(bias) >= 1e-2
    assert min(hidden_error, head_error) >= 0.1
