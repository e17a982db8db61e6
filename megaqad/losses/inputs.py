"""What a loss over two heads is given: checked, agreed on by all ranks, and cut into chunks of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses.objectives.base import ELSEWHERE
from megaqad.losses.sharding import Group, agree, gather_sequence, group_size

_SMALLEST_CHUNK = 512
_LARGEST_CHUNK = 4096
_CPU_BUDGET = 256 << 20
_CUDA_BUDGET = 1 << 30


@dataclass(frozen=True)
class Model:
    """One model's end: its last hidden states and its shard of the output head."""

    hidden: Tensor
    """[N, H] replicated, or [N / ranks, H] under sequence parallelism"""
    head: Tensor
    """[V_local, H]"""


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens besides their hidden states; the same on all ranks."""

    weights: Tensor
    """[N]"""
    labels: Tensor | None = None
    """int64 [N], global vocabulary ids; ids of tokens of weight 0 may be anything"""
    vocab_start: int = 0
    """global id of this rank's first column"""


@dataclass(frozen=True)
class Layout:
    """How vocabulary and tokens are spread over ranks."""

    group: Group = None
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Work:
    """What all ranks have agreed to do."""

    chunks: list[Tensor]
    """int64 indices of the tokens with a weight, chunk by chunk"""
    any_hidden_gradient: bool
    """whether some rank needs the gradient of the hidden states, so that all join its reduction"""


def chunk_tokens(tokens: int, columns: int, device: torch.device) -> int:
    """Tokens in a chunk, so that student and teacher logits of `columns` FP32 columns fit a fixed budget.

    At least 512, because a chunk has to amortize a pass over the head (256 costs 1.5 times the matrix products on CPU);
    at most 4096. Chunks are made equally long.
    """
    budget = _CUDA_BUDGET if device.type == "cuda" else _CPU_BUDGET
    longest = min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, budget // (2 * 4 * max(1, columns))))
    return max(1, -(-tokens // max(1, -(-tokens // longest))))


def _refusals(student: Model, teacher: Model | None, tokens: Tokens, layout: Layout) -> Iterator[str]:
    """Why these arguments cannot be used, one line each. Looks at this rank alone."""
    ranks, count = group_size(layout.group), tokens.weights.shape[0]
    if tokens.weights.ndim != 1:
        yield f"token_weights has shape {tuple(tokens.weights.shape)}; it must be [tokens]"
    if layout.sequence_parallel and count % ranks:
        yield f"{count} tokens do not divide into {ranks} sequence-parallel ranks; pad the sequence"
    expected = count // ranks if layout.sequence_parallel else count
    yield from _model_refusals("student", student, expected)
    if teacher is not None:
        yield from _model_refusals("teacher", teacher, expected)
        if teacher.head.shape[0] != student.head.shape[0]:
            yield (
                f"student head has {student.head.shape[0]} vocabulary rows on this rank and the teacher's has "
                f"{teacher.head.shape[0]}; cut both heads at the same columns, padded alike"
            )
    if tokens.labels is not None and tokens.labels.shape != tokens.weights.shape:
        yield f"labels {tuple(tokens.labels.shape)} and token_weights {tuple(tokens.weights.shape)} must be alike"


def _model_refusals(name: str, model: Model, tokens: int) -> Iterator[str]:
    hidden, head = tuple(model.hidden.shape), tuple(model.head.shape)
    if len(hidden) != 2 or len(head) != 2 or hidden[1] != head[1]:
        yield (
            f"{name} hidden states {hidden} and head {head} must be [tokens, hidden] and [vocabulary shard, hidden] "
            "of one hidden size"
        )
    elif hidden[0] != tokens:
        yield f"{name} hidden states hold {hidden[0]} tokens on this rank, but token_weights ask for {tokens}"
    if not {model.hidden.dtype, model.head.dtype} <= {torch.float32, torch.bfloat16}:
        yield f"{name} hidden states are {model.hidden.dtype}, its head {model.head.dtype}; use float32 or bfloat16"


def agree_on_work(
    student: Model, teacher: Model | None, tokens: Tokens, layout: Layout, *, hidden_gradient: bool
) -> Work:
    """Check the arguments on every rank and derive the same chunks everywhere.

    Collectives: one small all-gather (none without a group). Raises ValueError on all ranks if one must refuse.
    """
    problem = next(_refusals(student, teacher, tokens, layout), None)
    return _agreed(tokens, len(student.head), layout, hidden_gradient=hidden_gradient, problem=problem)


def plan_work(tokens: Tokens, columns: int, layout: Layout) -> Work:
    """``agree_on_work`` before there are any hidden states, for a student whose hidden states have a gradient.

    Whoever runs many microbatches plans them together, at a moment when the device has nothing to do: the agreement
    waits for it. ``columns``: rows of this rank's head. Collective and errors: the same.
    """
    return _agreed(tokens, columns, layout, hidden_gradient=True, problem=None)


def check(student: Model, teacher: Model | None, tokens: Tokens, layout: Layout) -> None:
    """Raise ValueError on this rank for arguments that do not fit; waits for nothing."""
    problem = next(_refusals(student, teacher, tokens, layout), None)
    if problem is not None:
        raise ValueError(problem)


def _agreed(tokens: Tokens, columns: int, layout: Layout, *, hidden_gradient: bool, problem: str | None) -> Work:
    device = tokens.weights.device
    active = torch.nonzero(tokens.weights).squeeze(-1) if problem is None else torch.empty(0, dtype=torch.int64)
    views = agree(
        {
            "refused": int(problem is not None),
            "tokens": tokens.weights.shape[0],
            "active": active.shape[0],
            "position": int(active.sum()),
            "columns": columns,
            "vocab_start": tokens.vocab_start,
            "hidden_gradient": int(hidden_gradient),
        },
        layout.group,
        device,
    )
    problem = problem or _disagreement(views, tokens, active)
    if problem is not None:
        raise ValueError(problem)
    size = chunk_tokens(active.shape[0], max(views["columns"]), device)
    return Work(list(active.split(size)) if active.numel() else [], any(views["hidden_gradient"]))


def _disagreement(views: dict[str, list[int]], tokens: Tokens, active: Tensor) -> str | None:
    if any(views["refused"]):
        return f"rank {views['refused'].index(1)} of the group refused its arguments; its own message says why"
    for name in ("tokens", "active", "position"):
        if len(set(views[name])) > 1:
            return f"token_weights differ between the ranks of the group ({name}: {views[name]}); they must be equal"
    if tokens.labels is None:
        return None
    starts = [sum(views["columns"][:rank]) for rank in range(len(views["columns"]))]
    if views["vocab_start"] != starts:
        return f"vocab_start is {views['vocab_start']} on the ranks, but their heads' rows start at {starts}"
    labels, size = tokens.labels[active], sum(views["columns"])
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < size:
        return (
            f"labels of weighted tokens range from {int(labels.min())} to {int(labels.max())}, outside the vocabulary "
            f"of {size}; give ignored tokens weight 0"
        )
    return None


def local_labels(labels: Tensor, vocab_start: int, columns: int) -> Tensor:
    """Global vocabulary ids as columns of this rank's shard, ELSEWHERE where another rank holds them."""
    local = labels - vocab_start
    return local.where((local >= 0) & (local < columns), ELSEWHERE)


def whole_sequence(model: Model, layout: Layout) -> Model:
    """The model, detached, with the hidden states of all tokens [N, H]; one all-gather under sequence parallelism."""
    hidden, head = model.hidden.detach(), model.head.detach()
    return Model(gather_sequence(hidden, layout.group) if layout.sequence_parallel else hidden, head)
