"""What each loss gets wrong: against FP64 from the same BF16 numbers."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megaqad.losses import reference

from . import contestants as ends
from .contestants import Problem


def errors(problem: Problem) -> Iterator[dict[str, Any]]:
    """Loss and gradients of the heads against the reference, which is FP64 from the same BF16 numbers."""
    hidden, head = (x.double().requires_grad_() for x in (problem.hidden_s, problem.head_s))
    dense = reference.forward_kl(hidden @ head.t(), problem.hidden_t.double() @ problem.head_t.double().t(), 1.0)
    true_loss = (dense * problem.weights).sum()
    true_loss.backward()
    tokens, vocabulary, width = len(problem.weights), *problem.head_s.shape
    losses = {
        "megaqad": ends.fused_loss(problem),
        "plain": ends.loss_by_logits(problem, ends.plain_kl),
        "modelopt": ends.loss_by_logits(problem, ends.modelopt_kl),
    }
    for name, loss_of in losses.items():
        leaf_hidden, leaf_head = (x.detach().requires_grad_() for x in (problem.hidden_s, problem.head_s))
        loss = loss_of(leaf_hidden, leaf_head)
        loss.backward()
        yield {
            "operation": "errors",
            "impl": name,
            **{"tokens": tokens, "vocabulary": vocabulary, "hidden": width, "ignored": 0.0},
            "kl": float(true_loss.detach()),
            "loss_bias": float(loss.detach().double() / true_loss.detach() - 1),
            "hidden_gradient_error": _relative_error(leaf_hidden.grad, hidden.grad),
            "head_gradient_error": _relative_error(leaf_head.grad, head.grad),
        }


def _relative_error(value: Tensor | None, truth: Tensor | None) -> float:
    assert value is not None
    assert truth is not None
    return float((value.double() - truth).norm() / truth.norm())
