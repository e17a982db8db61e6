"""Who takes part in the benchmark of the KL loss, and the random models that they are given.

`megaqad` (what `impl="auto"` takes), its PyTorch kernel (`megaqad_torch`), its reference; `plain`, that is
`F.kl_div` of two FP32 `log_softmax`; ModelOpt's `LogitsKLLoss`, fed by a BF16 head as Megatron-Core's output layer
feeds it; Liger's chunked loss where it is installed; for `heads` also the four matrix products alone, in the given
type (`products`) and in FP32 (`products_fp32`), which is what a CPU without BF16 instructions has to run. Of a sharded
vocabulary only what can take its shard.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megaqad.losses import linear_kl, vocab_parallel_kl

_LOGIT_STD, _NOISE = 5.0, 0.018
_IGNORE = -100

Run = Callable[[], "list[Tensor | None]"]
"""forward and backward; returns the gradients"""
Prepare = Callable[[], Run]
"""makes fresh leaves, untimed, and gives the call to time"""
Loss = Callable[[Tensor, Tensor], Tensor]
"""a scalar of the student's hidden states and head, or KL per token of both models' logits"""


@dataclass(frozen=True)
class Place:
    """Where the vocabulary is: on one device, or in equal shards on the ranks of a group."""

    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    def shard(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's."""
        return whole if self.group is None else whole.tensor_split(self.ranks, dim)[self.group.rank()].clone()


@dataclass(frozen=True)
class Problem:
    """Two models' ends."""

    hidden_s: Tensor  # [N, H]
    head_s: Tensor  # [V, H]
    hidden_t: Tensor
    head_t: Tensor
    weights: Tensor  # [N], 0 where ignored, else 1 / count


def make_problem(tokens: int, vocabulary: int, hidden: int, place: Place, seed: int) -> Problem:
    """A teacher with logits of standard deviation 5 and a student with other hidden states: KL about 3e-3 per token."""
    draw = torch.Generator().manual_seed(seed)
    hidden_t = torch.randn(tokens, hidden, generator=draw)
    head = (torch.randn(vocabulary, hidden, generator=draw) * _LOGIT_STD / hidden**0.5).to(place.device, torch.bfloat16)
    hidden_s = hidden_t + _NOISE * torch.randn(tokens, hidden, generator=draw)
    hidden_s, hidden_t = (x.to(place.device, torch.bfloat16) for x in (hidden_s, hidden_t))
    head = place.shard(head, dim=0)
    return Problem(hidden_s, head, hidden_t, head.clone(), torch.full((tokens,), 1 / tokens, device=place.device))


def ignore(problem: Problem, share: float) -> Problem:
    """The same with the first tokens of every stretch ignored; the others' weights add up to 1."""
    tokens = len(problem.weights)
    kept = torch.arange(tokens, device=problem.weights.device) % 10 >= round(10 * share)
    return replace(problem, weights=kept.float() / kept.sum())


def make_logits(tokens: int, vocabulary: int, place: Place, seed: int) -> tuple[Tensor, Tensor]:
    """BF16 logits [tokens, vocabulary] of a student and its teacher, of standard deviation 5, 0.1 apart."""
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, vocabulary, generator=draw).mul_(_LOGIT_STD)
    student = teacher + 0.1 * torch.randn(tokens, vocabulary, generator=draw)
    student, teacher = (place.shard(z.to(place.device, torch.bfloat16), dim=1) for z in (student, teacher))
    return student, teacher


def import_modelopt() -> Any:
    """ModelOpt's loss for Megatron-Core; tens of seconds of imports, so not at the top."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    return LogitsKLLoss


def modelopt_kl(student: Tensor, teacher: Tensor, ranks: int = 1) -> Tensor:
    """KL per token by ModelOpt's loss, which wants Megatron's [s, b, V].

    Of shards on several ranks it is this one's part of KL, and its gradient that of the sum.
    """
    loss = import_modelopt()(SimpleNamespace(tensor_model_parallel_size=ranks))
    token_kl: Tensor = loss(student.unsqueeze(1), teacher.unsqueeze(1))[0]
    return token_kl.squeeze(0)


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL per token as PyTorch's documentation would have it."""
    log_s, log_t = (F.log_softmax(z.float(), dim=-1) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def fused_loss(problem: Problem, **options: Any) -> Loss:
    """`linear_kl` of hidden states and head."""

    def loss_of(hidden: Tensor, head: Tensor) -> Tensor:
        weights = problem.weights
        return linear_kl(hidden, head, problem.hidden_t, problem.head_t, token_weights=weights, **options)[0]

    return loss_of


def loss_by_logits(problem: Problem, token_kl: Loss, group: dist.ProcessGroup | None = None) -> Loss:
    """The weighted sum of `token_kl` over the BF16 logits of hidden states and head, column-parallel on a group."""

    def loss_of(hidden: Tensor, head: Tensor) -> Tensor:
        if group is not None:
            from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)  # sums the gradients of the ranks
        values = token_kl(hidden @ head.t(), problem.hidden_t @ problem.head_t.t())
        return (values * problem.weights).sum()

    return loss_of


def logits_contestants(tokens: int, vocabulary: int, place: Place, seed: int) -> dict[str, Prepare]:
    """Everything that takes both models' logits to the gradient of the mean KL."""
    student, teacher = make_logits(tokens, vocabulary, place, seed)
    ours = partial(vocab_parallel_kl, group=place.group, inplace=True)
    losses: dict[str, Loss] = {
        "megaqad": ours,
        "megaqad_torch": partial(ours, impl="torch"),
        "megaqad_reference": partial(ours, impl="reference"),
        "modelopt": partial(modelopt_kl, ranks=place.ranks),
    }
    if place.group is None:
        losses["plain"] = plain_kl

    def prepare(token_kl: Loss) -> Run:
        leaf = student.clone().requires_grad_()

        def run() -> list[Tensor | None]:
            token_kl(leaf, teacher).mean().backward()
            return [leaf.grad]

        return run

    return {name: partial(prepare, token_kl) for name, token_kl in losses.items()}


def head_contestants(problem: Problem, place: Place) -> dict[str, Prepare]:
    """Everything that takes hidden states and heads to gradients of both."""
    losses = {
        "megaqad": fused_loss(problem, group=place.group),
        "megaqad_torch": fused_loss(problem, group=place.group, impl="torch"),
        "modelopt": loss_by_logits(problem, partial(modelopt_kl, ranks=place.ranks), place.group),
    }
    if place.group is None:
        losses["plain"] = loss_by_logits(problem, plain_kl)
        if liger_lacks() is None:
            losses["liger"] = _liger(problem)

    def prepare(loss_of: Loss) -> Run:
        hidden, head = (x.detach().requires_grad_() for x in (problem.hidden_s, problem.head_s))

        def run() -> list[Tensor | None]:
            loss_of(hidden, head).backward()
            return [hidden.grad, head.grad]

        return run

    return {
        **{name: partial(prepare, loss_of) for name, loss_of in losses.items()},
        "products": lambda: partial(_products, problem, torch.bfloat16),
        "products_fp32": lambda: partial(_products, problem, torch.float32),
    }


def liger_lacks() -> str | None:
    """Why Liger's loss cannot run here."""
    try:
        importlib.import_module("liger_kernel.chunked_loss")
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error})"
    return None


def _liger(problem: Problem) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    labels = torch.where(problem.weights != 0, 0, _IGNORE)
    return lambda hidden, head: loss(hidden, head, problem.hidden_t, problem.head_t, labels)


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
