"""Who takes part in the benchmark of the KL loss, and the random models that they are given.

`megaqad` (what `impl="auto"` takes), its PyTorch kernel (`megaqad_torch`), its reference; `plain`, that is
`F.kl_div` of two FP32 `log_softmax`; ModelOpt's `LogitsKLLoss`, fed by a BF16 head as Megatron-Core's output layer
feeds it; Liger's chunked loss where it is installed; for `heads` also the four matrix products alone, in the given
type (`products`) and in FP32 (`products_fp32`), which is what a CPU without BF16 instructions has to run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaqad.losses import linear_kl, vocab_parallel_kl

_LOGIT_STD, _NOISE = 5.0, 0.018
_IGNORE = -100

Run = Callable[[], "list[Tensor | None]"]
"""forward and backward; returns the gradients"""
Contestants = dict[str, Callable[[], Run]]
"""name -> prepares fresh leaves, untimed, and gives the call to time"""


@dataclass(frozen=True)
class Problem:
    """Two models' ends."""

    hidden_s: Tensor  # [N, H]
    head_s: Tensor  # [V, H]
    hidden_t: Tensor
    head_t: Tensor
    weights: Tensor  # [N], 0 where ignored, else 1 / count

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_s.detach().requires_grad_(), self.head_s.detach().requires_grad_()


def make_problem(tokens: int, vocabulary: int, hidden: int, device: torch.device, seed: int) -> Problem:
    """A teacher with logits of standard deviation 5 and a student with other hidden states: KL about 3e-3 per token."""
    draw = torch.Generator().manual_seed(seed)
    hidden_t = torch.randn(tokens, hidden, generator=draw)
    head = (torch.randn(vocabulary, hidden, generator=draw) * _LOGIT_STD / hidden**0.5).to(device, torch.bfloat16)
    hidden_s = hidden_t + _NOISE * torch.randn(tokens, hidden, generator=draw)
    hidden_s, hidden_t = (x.to(device, torch.bfloat16) for x in (hidden_s, hidden_t))
    return Problem(hidden_s, head, hidden_t, head.clone(), torch.full((tokens,), 1 / tokens, device=device))


def ignore(problem: Problem, share: float) -> Problem:
    """The same with the first tokens of every stretch ignored; the others' weights add up to 1."""
    tokens = len(problem.weights)
    kept = torch.arange(tokens, device=problem.weights.device) % 10 >= round(10 * share)
    return replace(problem, weights=kept.float() / kept.sum())


def import_modelopt() -> Any:
    """ModelOpt's loss for Megatron-Core; tens of seconds of imports, so not at the top."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    return LogitsKLLoss


def modelopt_kl(student: Tensor, teacher: Tensor, ranks: int = 1) -> Tensor:
    """KL per token by ModelOpt's loss, which wants Megatron's [s, b, V].

    Of shards on several ranks it is this one's part of KL, and its gradient that of the sum.
    """
    token_kl, _, _ = import_modelopt()(SimpleNamespace(tensor_model_parallel_size=ranks))(
        student.unsqueeze(1), teacher.unsqueeze(1)
    )
    return token_kl.squeeze(0)


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL per token as PyTorch's documentation would have it."""
    log_s, log_t = (F.log_softmax(z.float(), dim=-1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def make_logits(tokens: int, vocabulary: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """BF16 logits [tokens, vocabulary] of a student and its teacher, of standard deviation 5, 0.1 apart."""
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, vocabulary, generator=draw).mul_(_LOGIT_STD)
    student = teacher + 0.1 * torch.randn(tokens, vocabulary, generator=draw)
    return student.to(device, torch.bfloat16), teacher.to(device, torch.bfloat16)


def of_given_logits(
    student: Tensor, teacher: Tensor, token_kl: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Run]:
    """The mean of `token_kl` over logits that exist already, and its gradient."""

    def prepare() -> Run:
        leaf = student.clone().requires_grad_()

        def run() -> list[Tensor | None]:
            token_kl(leaf, teacher).mean().backward()
            return [leaf.grad]

        return run

    return prepare


def of_heads(problem: Problem, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Run]:
    """`loss_of` the student's hidden states and head, and the gradients of both."""

    def prepare() -> Run:
        hidden, head = problem.leaves()

        def run() -> list[Tensor | None]:
            loss_of(hidden, head).backward()
            return [hidden.grad, head.grad]

        return run

    return prepare


def fused_loss(problem: Problem, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """`linear_kl` of hidden states and head."""

    def loss_of(hidden: Tensor, head: Tensor) -> Tensor:
        weights = problem.weights
        return linear_kl(hidden, head, problem.hidden_t, problem.head_t, token_weights=weights, **options)[0]

    return loss_of


def loss_by_logits(
    problem: Problem, token_kl: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The weighted sum of `token_kl` over the BF16 logits of hidden states and head."""

    def loss_of(hidden: Tensor, head: Tensor) -> Tensor:
        values = token_kl(hidden @ head.t(), problem.hidden_t @ problem.head_t.t())
        return (values * problem.weights).sum()

    return loss_of


def logits_contestants(tokens: int, vocabulary: int, device: torch.device, seed: int) -> Contestants:
    student, teacher = make_logits(tokens, vocabulary, device, seed)
    ours = {"megaqad": "auto", "megaqad_torch": "torch", "megaqad_reference": "reference"}
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        **{name: partial(vocab_parallel_kl, inplace=True, impl=impl) for name, impl in ours.items()},
        "plain": plain_kl,
        "modelopt": modelopt_kl,
    }
    return {name: of_given_logits(student, teacher, token_kl) for name, token_kl in losses.items()}


def head_contestants(problem: Problem) -> Contestants:
    """Everything that takes hidden states and heads to gradients of both."""
    kept = problem.weights != 0
    contestants = {
        "megaqad": of_heads(problem, fused_loss(problem)),
        "megaqad_torch": of_heads(problem, fused_loss(problem, impl="torch")),
        "plain": of_heads(problem, loss_by_logits(problem, plain_kl)),
        "modelopt": of_heads(problem, loss_by_logits(problem, modelopt_kl)),
        "products": lambda: lambda: _products(problem, torch.bfloat16),
        "products_fp32": lambda: lambda: _products(problem, torch.float32),
    }
    if liger_lacks() is None:
        contestants["liger"] = lambda: _liger(problem, kept)
    return contestants


def liger_lacks() -> str | None:
    """Why Liger's loss cannot run here."""
    try:
        importlib.import_module("liger_kernel.chunked_loss")
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error})"
    return None


def _liger(problem: Problem, kept: Tensor) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    labels = torch.where(kept, 0, _IGNORE)
    hidden, head = problem.leaves()

    def run() -> list[Tensor | None]:
        loss(hidden, head, problem.hidden_t, problem.head_t, labels).backward()
        return [hidden.grad, head.grad]

    return run


def _products(problem: Problem, dtype: torch.dtype) -> list[Tensor | None]:
    """The two heads, and the gradients of hidden states and head, and nothing between them; 512 tokens at a time.

    What stands for the gradient of the logits is the logits, so the results mean nothing.
    """
    head_s, head_t = problem.head_s.to(dtype), problem.head_t.to(dtype)
    total = torch.zeros_like(head_s)
    for rows in range(0, len(problem.weights), 512):
        hidden_s, hidden_t = (x[rows : rows + 512].to(dtype) for x in (problem.hidden_s, problem.hidden_t))
        logits = hidden_t @ head_t.t()
        torch.mm(hidden_s, head_s.t(), out=logits)
        torch.mm(logits, head_s)
        total.addmm_(logits.t(), hidden_s)
    return []
