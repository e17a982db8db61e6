"""The loss over a sharded vocabulary beside ModelOpt's, on the ranks that were started.

    torchrun --nproc-per-node 2 -m megaqad bench kl

The same random models as in `bench_kl`, rank r holding the r-th of the equal slices of the vocabulary. Contestants take
turns; a round's seconds are those of the slowest rank. `products` are this rank's four matrix products alone.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.bench import kl
from megaqad.bench import kl_contestants as ends
from megaqad.bench.kl_contestants import Contestants, Problem, Run
from megaqad.losses import vocab_parallel_kl
from megaqad.runtime.ranks import Ranks

_LOGITS = {"cpu": ((2048, 32000), (512, 151936)), "cuda": ((8192, 151936),)}
_HEADS = {"cpu": ((2048, 32000, 1024),), "cuda": ((8192, 151936, 4096),)}


def bench_sharded_kl(
    context: Ranks,
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
        student, teacher = ends.make_logits(tokens, vocabulary, context.device, seed=0)
        contestants = _of_logits(_shard(student, context, dim=1), _shard(teacher, context, dim=1), context)
        del student, teacher
        yield from (common | shape | row for row in _measure(contestants, context, repeats))
    for tokens, vocabulary, hidden in head_shapes or _HEADS[kind]:
        shape = {"operation": "heads", "tokens": tokens, "vocabulary": vocabulary, "hidden": hidden}
        whole = ends.make_problem(tokens, vocabulary, hidden, context.device, seed=0)
        heads = (_shard(head, context, dim=0) for head in (whole.head_s, whole.head_t))
        contestants = _of_heads(replace(whole, head_s=next(heads), head_t=next(heads)), context)
        yield from (common | shape | row for row in _measure(contestants, context, repeats))


def _shard(whole: Tensor, context: Ranks, dim: int) -> Tensor:
    return whole.tensor_split(context.world_size, dim)[context.tensor_rank].clone()


def _of_logits(student: Tensor, teacher: Tensor, context: Ranks) -> Contestants:
    ours = partial(vocab_parallel_kl, group=context.tensor_group, inplace=True)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "megaqad": ours,
        "megaqad_torch": partial(ours, impl="torch"),
        "modelopt": partial(ends.modelopt_kl, ranks=context.world_size),
    }
    return {name: ends.of_given_logits(student, teacher, token_kl) for name, token_kl in losses.items()}


def _of_heads(problem: Problem, context: Ranks) -> Contestants:
    group = context.tensor_group
    modelopt = ends.of_heads(problem, ends.loss_by_logits(problem, partial(ends.modelopt_kl, ranks=context.world_size)))

    def column_parallel() -> Run:
        run = modelopt()

        def run_and_sum() -> list[Tensor | None]:
            hidden_gradient, head_gradient = run()
            assert hidden_gradient is not None
            dist.all_reduce(hidden_gradient, group=group)  # as a column-parallel head does in backward
            return [hidden_gradient, head_gradient]

        return run_and_sum

    return {
        "megaqad": ends.of_heads(problem, ends.fused_loss(problem, group=group)),
        "modelopt": column_parallel,
        "products": ends.head_contestants(problem)["products"],
    }


def _measure(contestants: Contestants, context: Ranks, repeats: int) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, prepare in contestants.items():
            spent = _seconds(prepare(), context)
            if round_number:  # the first compiles what is compiled on first use
                seconds[name].append(spent)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield {"impl": name, "seconds": median, "ratio_to_modelopt": median / medians["modelopt"]}


def _seconds(run: Run, context: Ranks) -> float:
    """Of the slowest rank."""
    dist.barrier()
    spent = torch.tensor(kl.seconds_of(run, context.device), device=context.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)
