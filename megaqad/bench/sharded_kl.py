"""The loss over a sharded vocabulary beside ModelOpt's, on the ranks that were started.

    torchrun --nproc-per-node 2 -m megaqad bench kl

The same random models as in `bench_kl`, rank r holding the r-th of the equal slices of the vocabulary. Contestants take
turns; a round's seconds are those of the slowest rank. `products` are this rank's four matrix products alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.bench import kl
from megaqad.bench.kl import Contestants, Problem, Run
from megaqad.losses import linear_kl, vocab_parallel_kl
from megaqad.runtime.parallel import ParallelContext

_LOGITS = {"cpu": ((2048, 32000), (512, 151936)), "cuda": ((8192, 151936),)}
_HEADS = {"cpu": ((2048, 32000, 1024),), "cuda": ((8192, 151936, 4096),)}


def bench_sharded_kl(
    context: ParallelContext,
    logits_shapes: Sequence[tuple[int, int]] | None = None,
    head_shapes: Sequence[tuple[int, int, int]] | None = None,
    *,
    repeats: int = 5,
) -> Iterator[dict[str, Any]]:
    """Measure every contestant on all ranks; the same JSON-able dicts on each, as they are made.

    Args:
        context: all ranks in one tensor-parallel group.
        logits_shapes: (tokens, whole vocabulary) for `operation="logits"`.
        head_shapes: (tokens, whole vocabulary, hidden) for `operation="heads"`.
        repeats: rounds, of which the median is reported.

    Yields:
        `operation`, `impl`, `ranks`, `tokens`, `vocabulary`, `hidden`, `dtype`, `device`, `threads` (of a rank),
        `allocator`, `repeats`, `seconds` (median over rounds of the slowest rank), `ratio_to_modelopt`.

    Collectives: those of the contestants, a barrier before and a maximum after each round.
    """
    kind, ranks = context.device.type, context.world_size
    common = {"bench": "kl", "ranks": ranks, "threads": torch.get_num_threads(), "repeats": repeats}
    common |= {"dtype": "bfloat16", "device": kind, "allocator": kl.allocator(context.device)}
    for tokens, vocabulary in logits_shapes or _LOGITS[kind]:
        shape = {"operation": "logits", "tokens": tokens, "vocabulary": vocabulary, "hidden": None}
        student, teacher = kl.make_logits(tokens, vocabulary, context.device, seed=0)
        contestants = _of_logits(_shard(student, context, dim=1), _shard(teacher, context, dim=1), context)
        del student, teacher
        yield from (common | shape | row for row in _measure(contestants, context, repeats))
    for tokens, vocabulary, hidden in head_shapes or _HEADS[kind]:
        shape = {"operation": "heads", "tokens": tokens, "vocabulary": vocabulary, "hidden": hidden}
        whole = kl.make_problem(tokens, vocabulary, hidden, context.device, seed=0)
        heads = (_shard(head, context, dim=0) for head in (whole.head_s, whole.head_t))
        contestants = _of_heads(replace(whole, head_s=next(heads), head_t=next(heads)), context)
        yield from (common | shape | row for row in _measure(contestants, context, repeats))


def _shard(whole: Tensor, context: ParallelContext, dim: int) -> Tensor:
    return whole.tensor_split(context.world_size, dim)[context.tensor_rank].clone()


def _modelopt(student: Tensor, teacher: Tensor, ranks: int) -> Tensor:
    """This shard's part of KL per token, which is what ModelOpt's loss gives; its gradient is that of the sum."""
    loss = kl.import_modelopt()(SimpleNamespace(tensor_model_parallel_size=ranks))
    part, _, _ = loss(student.unsqueeze(1), teacher.unsqueeze(1))
    values: Tensor = part.squeeze(0)
    return values


def _of_logits(student: Tensor, teacher: Tensor, context: ParallelContext) -> Contestants:
    group, ranks = context.tensor_group, context.world_size

    def contestant(token_kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Run]:
        def prepare() -> Run:
            leaf = student.clone().requires_grad_()

            def run() -> list[Tensor | None]:
                token_kl(leaf, teacher).mean().backward()
                return [leaf.grad]

            return run

        return prepare

    return {
        "megaqad": contestant(partial(vocab_parallel_kl, group=group, inplace=True)),
        "megaqad_torch": contestant(partial(vocab_parallel_kl, group=group, inplace=True, impl="torch")),
        "modelopt": contestant(partial(_modelopt, ranks=ranks)),
    }


def _of_heads(problem: Problem, context: ParallelContext) -> Contestants:
    group, ranks = context.tensor_group, context.world_size

    def ours() -> Run:
        hidden, head = problem.leaves()

        def run() -> list[Tensor | None]:
            loss, _ = linear_kl(
                hidden, head, problem.hidden_t, problem.head_t, token_weights=problem.weights, group=group
            )
            loss.backward()
            return [hidden.grad, head.grad]

        return run

    def modelopt() -> Run:
        hidden, head = problem.leaves()

        def run() -> list[Tensor | None]:
            values = _modelopt(hidden @ head.t(), problem.hidden_t @ problem.head_t.t(), ranks)
            (values * problem.weights).sum().backward()
            assert hidden.grad is not None
            dist.all_reduce(hidden.grad, group=group)  # as a column-parallel head does in backward
            return [hidden.grad, head.grad]

        return run

    products = kl.head_contestants(problem)["products"]
    return {"megaqad": ours, "modelopt": modelopt, "products": products}


def _measure(contestants: Contestants, context: ParallelContext, repeats: int) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, prepare in contestants.items():
            spent = _seconds(prepare(), context)
            if round_number:  # the first compiles what is compiled on first use
                seconds[name].append(spent)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield {"impl": name, "seconds": median, "ratio_to_modelopt": median / medians["modelopt"]}


def _seconds(run: Run, context: ParallelContext) -> float:
    """Of the slowest rank."""
    kl.wait(context.device)
    dist.barrier()
    start = time.perf_counter()
    run()
    kl.wait(context.device)
    spent = torch.tensor(time.perf_counter() - start, device=context.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)
