"""Which kernels a step runs, part by part."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 60
"""Kernels named, the longest first."""


def kernel_rows(run: Callable[[], object], parts: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Run once under PyTorch's profiler: of each part (a ``record_function`` that waits for the device at its end) the
    kernels with how often and how long they ran; on the CPU the operations, without those that they call.

    A kernel belongs to the innermost part within which it ran, to ``elsewhere`` if there is none.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
    events = list(profiler.events() or [])
    spans = sorted(
        ((event.time_range.start, event.time_range.end, event.name) for event in events if event.name in parts),
        key=lambda span: span[0],
    )
    counted: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name in parts or is_kernel is not on_gpu:
            continue
        start = event.time_range.start
        within = [name for first, last, name in spans if first <= start < last]
        spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        entry = counted[within[-1] if within else "elsewhere", event.name]
        entry[0] += 1
        entry[1] += spent
    longest = sorted(counted.items(), key=lambda item: -item[1][1])[:MOST]
    for (part, name), (calls, spent) in longest:
        yield {"bench": "step", "profile": part, "kernel": name, "calls": int(calls), "microseconds": round(spent, 1)}
