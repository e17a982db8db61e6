"""The KL loss beside its peers: time, memory and errors, forward and backward.

Three operations, each on random models whose student is near its teacher:

| operation | input | what runs |
|---|---|---|
| `logits` | BF16 logits that exist already | KL of given logits |
| `heads` | BF16 hidden states and heads | both output heads and KL; on one rank also with half the tokens ignored |
| `errors` | the same, smaller, one rank | loss bias and gradient errors against FP64 from the same BF16 numbers |

Under `torchrun --nproc-per-node 2 -m megaqad bench kl` the vocabulary is sharded over the ranks. On CPU ratios depend
on the allocator by 5 to 20 times: with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000` freed memory is
reused, as a GPU's caching allocator does.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from megaqad.runtime import launch
from megaqad.runtime.ranks import ParallelSizes, join_ranks, parallel

from . import contestants as ends
from .contestants import Place, Prepare
from .errors import errors
from .measure import default_device, in_turns, machine, peak_memory, seconds_of

_LOGITS = {"cpu": ((2048, 32000), (512, 151936)), "cuda": ((8192, 32000), (4096, 151936))}
_HEADS = {"cpu": ((2048, 32000, 256), (2048, 32000, 1024)), "cuda": ((8192, 151936, 4096), (8192, 151936, 2048))}
_ERRORS = (64, 16000, 512)


def rows() -> Iterator[dict[str, Any]]:
    """Of ``megaqad bench kl``: of one process; or of this rank, on the main one alone."""
    from .trained import bench_trained

    ends.import_modelopt()  # it cannot be imported once the CPU device layer is on
    if launch.is_rank():
        join_ranks()
        with parallel(ParallelSizes(tensor=dist.get_world_size())) as ranks:
            yield from (row for row in bench_kl(place=Place(ranks.device, ranks.tensor_group)) if ranks.is_main)
    else:
        yield from bench_kl()
        yield from bench_trained()


def bench_kl(
    logits_shapes: Sequence[tuple[int, int]] | None = None,
    head_shapes: Sequence[tuple[int, int, int]] | None = None,
    *,
    place: Place | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure every contestant of every operation; one JSON-able dict each, as it is made, the same on every rank.

    Args:
        logits_shapes: (tokens, whole vocabulary) for `logits`.
        head_shapes: (tokens, whole vocabulary, hidden) for `heads`.
        place: where to run; without it the GPU when there is one, and one rank.
        repeats: rounds, of which the median is reported.
        seed: of the random models.

    Yields:
        `operation`, `impl`, `ranks`, `tokens`, `vocabulary`, `hidden`, `ignored`, `dtype`, `device`, `threads` (of a
        rank), `allocator`; then for `logits` and `heads` `repeats`, `seconds` (median, of the slowest rank),
        `seconds_min`, `ratio_to_modelopt` (of the medians, below 1 is faster), for `heads` `ratio_to_products`,
        `peak_tensor_bytes`, `peak_resident_bytes` (of this rank); for `errors` `kl` (true, per token), `loss_bias`
        (relative), `hidden_gradient_error`, `head_gradient_error` (L2, relative). A contestant that cannot run here
        has ``skipped``, the reason, in their place.

    Raises:
        ValueError: `repeats` is below 1.

    Collectives: those of the contestants, a barrier before and a maximum after each call.
    """
    place = place or Place(default_device())
    kind = place.device.type
    common = {"bench": "kl", "ranks": place.ranks, "dtype": "bfloat16", **machine(place.device)}
    if place.group is None:
        yield from (common | row for row in errors(ends.make_problem(*_ERRORS, place, seed)))
    for tokens, vocabulary in logits_shapes or _LOGITS[kind]:
        shape = {"operation": "logits", "tokens": tokens, "vocabulary": vocabulary, "hidden": None, "ignored": 0.0}
        prepared = ends.logits_contestants(tokens, vocabulary, place, seed)
        yield from (common | shape | row for row in _measure(prepared, place, repeats))
    for tokens, vocabulary, hidden in head_shapes or _HEADS[kind]:
        problem = ends.make_problem(tokens, vocabulary, hidden, place, seed)
        for ignored in (0.0, 0.5) if place.group is None else (0.0,):
            shape = {"operation": "heads", "tokens": tokens, "vocabulary": vocabulary, "hidden": hidden}
            shape["ignored"] = ignored
            prepared = ends.head_contestants(ends.ignore(problem, ignored), place)
            yield from (common | shape | row for row in _measure(prepared, place, repeats))
            if place.group is None and (reason := ends.liger_lacks()) is not None:
                yield common | shape | {"impl": "liger", "skipped": reason}


def _measure(prepared: Mapping[str, Prepare], place: Place, repeats: int) -> Iterator[dict[str, Any]]:
    def timed(prepare: Prepare) -> float:
        return seconds_of(prepare(), place.device, place.group)

    seconds = in_turns({name: partial(timed, prepare) for name, prepare in prepared.items()}, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    beside = [other for other in ("modelopt", "products", "products_fp32") if other in medians]
    for name, prepare in prepared.items():
        peak = peak_memory(prepare(), place.device)
        yield {
            "impl": name,
            "repeats": repeats,
            "seconds": medians[name],
            "seconds_min": min(seconds[name]),
            **{f"ratio_to_{other}": medians[name] / medians[other] for other in beside},
            "peak_tensor_bytes": peak.tensor_bytes,
            "peak_resident_bytes": peak.resident_bytes,
        }
