"""The KL loss beside its peers: time, memory and errors, forward and backward.

Three operations, each on random models whose student is near its teacher:

| operation | input | what runs |
|---|---|---|
| `logits` | BF16 logits that exist already | KL of given logits |
| `heads` | BF16 hidden states and heads | both output heads and KL; also with half the tokens ignored |
| `errors` | the same, smaller | loss bias and gradient errors against FP64 from the same BF16 numbers |

The contestants of `kl_contestants.py` take turns, every round running each once, so that a machine that slows down does
so for all; medians are reported. On CPU ratios depend on the allocator by 5 to 20 times: with
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000` freed memory is reused, as a GPU's caching allocator does.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaqad.bench import kl_contestants as ends
from megaqad.bench.kl_contestants import Contestants, Problem, Run
from megaqad.bench.memory import peak_memory
from megaqad.losses import reference

_LOGITS = {"cpu": ((2048, 32000), (512, 151936)), "cuda": ((8192, 32000), (4096, 151936))}
_HEADS = {"cpu": ((2048, 32000, 256), (2048, 32000, 1024)), "cuda": ((8192, 151936, 4096), (8192, 151936, 2048))}
_ERRORS = (64, 16000, 512)


def bench_kl(
    logits_shapes: Sequence[tuple[int, int]] | None = None,
    head_shapes: Sequence[tuple[int, int, int]] | None = None,
    *,
    device: str | torch.device | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure every contestant of every operation; one JSON-able dict each, as it is made.

    Args:
        logits_shapes: (tokens, vocabulary) for `logits`.
        head_shapes: (tokens, vocabulary, hidden) for `heads`.
        device: where to run; CUDA when there is one.
        repeats: rounds, of which the median is reported.
        seed: of the random models.

    Yields:
        `operation`, `impl`, `tokens`, `vocabulary`, `hidden`, `ignored`, `dtype`, `device`, `threads`, `allocator`;
        then for `logits` and `heads` `repeats`, `seconds` (median), `seconds_min`, `ratio_to_modelopt` (of the
        medians, below 1 is faster), for `heads` `ratio_to_products`, `peak_tensor_bytes`, `peak_resident_bytes`; for
        `errors` `kl` (true, per token), `loss_bias` (relative), `hidden_gradient_error`, `head_gradient_error` (L2,
        relative). A contestant that cannot run here has ``skipped``, the reason, in their place.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    common = {
        "bench": "kl",
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "allocator": allocator(where),
    }
    for row in _rows(logits_shapes or _LOGITS[where.type], head_shapes or _HEADS[where.type], where, repeats, seed):
        yield common | row


def allocator(device: torch.device) -> str:
    """Whether freed memory is reused, which decides ratios on the CPU."""
    if device.type == "cuda":
        return "caching"
    return "reuse" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default"


def _rows(
    logits_shapes: Sequence[tuple[int, int]],
    head_shapes: Sequence[tuple[int, int, int]],
    device: torch.device,
    repeats: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    yield from errors(ends.make_problem(*_ERRORS, device, seed))
    for tokens, vocabulary in logits_shapes:
        contestants = ends.logits_contestants(tokens, vocabulary, device, seed)
        described = {"operation": "logits", "tokens": tokens, "vocabulary": vocabulary, "hidden": None, "ignored": 0.0}
        for row in _measure(contestants, device, repeats):
            yield described | row
    for tokens, vocabulary, hidden in head_shapes:
        problem = ends.make_problem(tokens, vocabulary, hidden, device, seed)
        for ignored in (0.0, 0.5):
            described = {"operation": "heads", "tokens": tokens, "vocabulary": vocabulary}
            contestants = ends.head_contestants(ends.ignore(problem, ignored))
            for row in _measure(contestants, device, repeats):
                yield described | {"hidden": hidden, "ignored": ignored} | row
            if (reason := ends.liger_lacks()) is not None:
                yield described | {"hidden": hidden, "ignored": ignored, "impl": "liger", "skipped": reason}


def _measure(contestants: Contestants, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for prepare in contestants.values():  # compiles what is compiled on first use
        prepare()()
    for _ in range(repeats):
        for name, prepare in contestants.items():
            seconds[name].append(seconds_of(prepare(), device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, prepare in contestants.items():
        peak = peak_memory(prepare(), device)
        row: dict[str, Any] = {
            "impl": name,
            "repeats": repeats,
            "seconds": medians[name],
            "seconds_min": min(seconds[name]),
            "ratio_to_modelopt": medians[name] / medians["modelopt"],
            "peak_tensor_bytes": peak.tensor_bytes,
            "peak_resident_bytes": peak.resident_bytes,
        }
        if "products" in medians:
            row |= _ratios_to_products(name, medians)
        yield row


def _ratios_to_products(name: str, medians: Mapping[str, float]) -> dict[str, float]:
    return {f"ratio_to_{products}": medians[name] / medians[products] for products in ("products", "products_fp32")}


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device) -> float:
    """Of this rank, with all that the device had to do."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def errors(problem: Problem) -> Iterator[dict[str, Any]]:
    """Loss and gradients of the heads against the reference, which is FP64 from the same BF16 numbers."""
    hidden, head = (x.double().requires_grad_() for x in (problem.hidden_s, problem.head_s))
    dense = reference.forward_kl(hidden @ head.t(), problem.hidden_t.double() @ problem.head_t.double().t(), 1.0)
    true_loss = (dense * problem.weights).sum()
    true_loss.backward()
    tokens, vocabulary, width = len(problem.weights), *problem.head_s.shape
    for name, loss_of in _LOSSES.items():
        leaf_hidden, leaf_head = problem.leaves()
        loss = loss_of(problem)(leaf_hidden, leaf_head)
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


_LOSSES: dict[str, Callable[[Problem], Callable[[Tensor, Tensor], Tensor]]] = {
    "megaqad": ends.fused_loss,
    "plain": partial(ends.loss_by_logits, token_kl=ends.plain_kl),
    "modelopt": partial(ends.loss_by_logits, token_kl=ends.modelopt_kl),
}


def _relative_error(value: Tensor | None, truth: Tensor | None) -> float:
    assert value is not None
    assert truth is not None
    return float((value.double() - truth).norm() / truth.norm())
