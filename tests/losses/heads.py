"""A small student and teacher, their dense FP64 losses, and one rank's share of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from tests.losses.oracle import dense_kl


@dataclass(frozen=True)
class Heads:
    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    weights: Tensor


def make_heads(
    tokens: int = 24,
    vocabulary: int = 997,
    hidden: int = 32,
    teacher_hidden: int | None = None,
    *,
    noise: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Heads:
    """Logits of standard deviation about 2; every third token has weight 0 and NaN hidden states."""
    draw = torch.Generator().manual_seed(seed)
    wide = teacher_hidden or hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    hidden_t, head_t = normal(tokens, wide), normal(vocabulary, wide) * 2 / wide**0.5
    hidden_s, head_s = hidden_t[:, :hidden] + noise * normal(tokens, hidden), head_t[:, :hidden].clone()
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    weights = (torch.rand(tokens, generator=draw) + 0.5) / tokens
    weights[::3], labels[::3] = 0.0, -100
    hidden_s[0], hidden_t[3] = torch.nan, torch.nan
    hidden_s, head_s, hidden_t, head_t = (x.to(dtype) for x in (hidden_s, head_s, hidden_t, head_t))
    return Heads(hidden_s, head_s, hidden_t, head_t, labels, weights)


@dataclass(frozen=True)
class Truth:
    loss: Tensor
    token_loss: Tensor
    hidden_gradient: Tensor
    head_gradient: Tensor


def differentiate(heads: Heads, dense_loss) -> Truth:
    """FP64 by autograd: `dense_loss(student_logits, teacher_logits, labels)` of the weighted tokens."""
    keep = heads.weights != 0
    hidden, head = heads.student_hidden.double().requires_grad_(), heads.student_head.double().requires_grad_()
    teacher = heads.teacher_hidden[keep].double() @ heads.teacher_head.double().t()
    token_loss = dense_loss(hidden[keep] @ head.t(), teacher, heads.labels[keep])
    loss = (token_loss * heads.weights[keep].double()).sum()
    loss.backward()
    everyone = torch.zeros(len(keep), dtype=torch.float64)
    everyone[keep] = token_loss.detach()
    return Truth(loss.detach(), everyone, hidden.grad, head.grad)


def kl_truth(heads: Heads, temperature: float = 1.0) -> Truth:
    return differentiate(heads, lambda student, teacher, _: dense_kl(student, teacher, temperature))


def cuts_of(vocabulary: int, world_size: int) -> list[int]:
    """Uneven shards; with three ranks the middle one is empty."""
    return {
        1: [0, vocabulary],
        2: [0, vocabulary // 3, vocabulary],
        3: [0, 7, 7, vocabulary],
        4: [0, vocabulary // 5, vocabulary // 2, vocabulary - 9, vocabulary],
    }[world_size]


@dataclass(frozen=True)
class Share:
    """What one rank holds: leaves that require gradients, and the arguments of its calls."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    vocab_start: int
    group: dist.ProcessGroup | None


def share(heads: Heads, rank: int, world_size: int, sequence_parallel: bool = False) -> Share:
    cuts, tokens = cuts_of(len(heads.student_head), world_size), len(heads.weights)
    rows = slice(cuts[rank], cuts[rank + 1])
    mine = slice(rank * tokens // world_size, (rank + 1) * tokens // world_size) if sequence_parallel else slice(None)
    return Share(
        heads.student_hidden[mine].clone().requires_grad_(),
        heads.student_head[rows].clone().requires_grad_(),
        heads.teacher_hidden[mine].clone(),
        heads.teacher_head[rows].clone(),
        cuts[rank],
        dist.group.WORLD if world_size > 1 else None,
    )
