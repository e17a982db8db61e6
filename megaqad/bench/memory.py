"""The most memory that a call needs beyond what was there before it.

On CUDA the caching allocator counts. On CPU PyTorch's profiler reports every tensor allocation, which says what the
code asks for, and Linux keeps the high-water mark of the resident set, which says what the machine had to find,
library buffers included. The high-water mark can be reset; with an allocator that keeps freed memory it starts high
and then shows little, so read it with the default allocator.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what was held when the call began."""

    tensor_bytes: int
    resident_bytes: int | None
    """None on CUDA and where Linux's /proc is missing"""


def peak_memory(run: Callable[[], object], device: torch.device) -> Peak:
    """Run once and report. What `run` returns counts as held until the end."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, None)
    resident = None
    if _CLEAR.exists():
        _CLEAR.write_text(_RESET_HIGH_WATER)
        before = _resident("VmRSS")
        run()
        resident = max(0, _resident("VmHWM") - before)
    return Peak(_profiled(run), resident)


def _resident(field: str) -> int:
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
