"""What every measurement shares: contestants in turns, a clock that waits for the device, the most memory of a call."""

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """What a measured time is a time of. ``allocator``: whether freed memory is reused, which decides ratios on CPU."""
    reuse = "caching" if device.type == "cuda" else "reuse" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "allocator": reuse,
    }


def in_turns(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant, each of which runs once and says how long that took.

    Each round runs each once, so that a machine that slows down does so for all. One round before is not counted: it
    compiles what is compiled on first use.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, run in contestants.items():
            spent = run()
            if round_number:
                seconds[name].append(spent)
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Of one call, with all that the device had to do; of the slowest rank of ``group``, which starts together."""
    if group is not None:
        dist.barrier(group)
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=group)
    return float(spent)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what was held when the call began."""

    tensor_bytes: int
    resident_bytes: int | None
    """None on CUDA and where Linux's /proc is missing"""


def peak_memory(run: Callable[[], object], device: torch.device) -> Peak:
    """Run once, on CPU twice, and report the most that it needs. What ``run`` returns counts as held until the end.

    On CUDA the caching allocator counts. On CPU PyTorch's profiler reports every tensor allocation, which says what the
    code asks for, and Linux keeps the high-water mark of the resident set, which says what the machine had to find,
    library buffers included; with an allocator that keeps freed memory it starts high and then shows little.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        wait(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, None)
    most = None
    if _CLEAR.exists():
        _CLEAR.write_text(_RESET_HIGH_WATER)
        before = resident("VmRSS")
        run()
        most = max(0, resident("VmHWM") - before)
    return Peak(_profiled(run), most)


def resident(field: str) -> int:
    """Bytes of this process's memory, by Linux's names: ``VmRSS`` now, ``VmHWM`` at its peak, pages of mapped files
    included. Not getrusage's, which begin at the peak of the parent process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _profiled(run: Callable[[], object]) -> int:
    """Highest running sum of the tensor bytes allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto = profiler.profiler
    assert kineto is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
