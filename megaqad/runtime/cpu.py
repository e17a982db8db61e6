"""Megatron-Core on a machine without a GPU: what it asks of CUDA, answered by the CPU.

Megatron-Core names the device in four ways, and each is answered here and nowhere else:

1. ``device="cuda"``, ``device=0``, ``.cuda()``, ``.to("cuda")``: a ``TorchFunctionMode`` rewrites the device of every
   torch call made while it is active. It costs about a microsecond per call.
2. ``torch.cuda.current_device()``, ``synchronize()``, streams, events, RNG state: these module functions are replaced.
   On one device there is one queue of work, so a stream or an event has nothing to order.
3. ``tensor.type()`` compared with ``"torch.cuda.FloatTensor"`` (gradient clipping, distributed optimizer): the same
   mode answers with the CUDA name.
4. ``tensor_parallel.random`` binds its CUDA helpers at import: they are replaced in that module.

This is the only place of the project that patches another library. It is applied once per process, on request, and
never when CUDA is present: there the very same callers meet the real thing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_MODE: list[TorchFunctionMode] = []


def _is_cuda(device: object) -> bool:
    """Whether a device argument means the GPU: ``"cuda"``, ``"cuda:1"``, a torch.device or an ordinal."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CpuForCuda(TorchFunctionMode):
    """Run torch calls that ask for the GPU on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], torch.Tensor) and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


class _Queue:
    """Stands for a CUDA stream or event: work on one CPU device is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _other: "_Queue") -> None:
        pass

    def wait_event(self, _event: "_Queue") -> None:
        pass

    def wait(self, _stream: "_Queue | None" = None) -> None:
        pass

    def record(self, _stream: "_Queue | None" = None) -> None:
        pass

    def record_event(self, event: "_Queue | None" = None) -> "_Queue":
        return event or _Queue()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _on_queue(_queue: _Queue) -> Iterator[None]:
    yield


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _nothing() -> Callable[..., None]:
    """A function that does nothing; a new one for every name, because torch.compile keeps rules by function."""
    return lambda *_, **__: None


def enable_cpu_device() -> None:
    """Let Megatron-Core run in this process without CUDA. Call before a model is built; repeated calls are free.

    Raises:
        AssertionError: CUDA is available; the real device must be used then.
    """
    if _MODE:
        return
    assert not torch.cuda.is_available(), "enable_cpu_device() is for machines without CUDA"
    queue = _Queue()
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "Stream": _Queue,
        "Event": _Queue,
        "stream": _on_queue,
        "current_stream": lambda *_: queue,
        "default_stream": lambda *_: queue,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    mode = _CpuForCuda()
    mode.__enter__()
    _MODE.append(mode)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state
    megatron_random._lazy_call = lambda callable_, **_: callable_()
