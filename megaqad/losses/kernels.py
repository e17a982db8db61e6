"""The interchangeable kernels of forward KL, and which one runs.

| impl | where | what it is |
|---|---|---|
| `reference` | anywhere | FP64, dense, differentiated by autograd (reference.py): the test oracle, slow on purpose |
| `torch` | anywhere | cache-sized blocks of PyTorch operations (blocks.py) |
| `native` | CPU with a C++ compiler | one pass per row in vector registers (native.cpp) |
| `triton` | CUDA | each logit read once per pass (triton_kernels.py); on the CPU only in Triton's interpreter |

`auto` takes the fastest that can run where the logits are; a name takes that one or refuses.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from megaqad.losses import blocks, native

_log = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "torch", "native", "triton"]


class Statistics(Protocol):
    """See `blocks.statistics`."""

    def __call__(
        self, student: Tensor, teacher: Tensor | None, *, temperature: float, mask: Tensor | None = None
    ) -> Tensor: ...


class Gradient(Protocol):
    """See `blocks.gradient`."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        *,
        peaks: Tensor,
        factors: Tensor,
        temperature: float,
        out: Tensor,
    ) -> Tensor: ...


class Merge(Protocol):
    """See `blocks.merge`."""

    def __call__(self, gathered: Tensor, *, temperature: float) -> blocks.KLSums: ...


@dataclass(frozen=True)
class Kernel:
    """One implementation of forward KL's reductions."""

    name: str
    statistics: Statistics
    gradient: Gradient
    merge: Merge = blocks.merge
    in_order: bool = True
    """Whether `gradient` has read what it needs of a row's first 2k bytes before it writes the row's first k: `out` may
    then be BF16 in the first halves of the rows of FP32 logits."""


TORCH = Kernel("torch", blocks.statistics, blocks.gradient)


NATIVE = Kernel("native", native.statistics, native.gradient)


def choose(impl: str, device: torch.device, dtypes: set[torch.dtype]) -> Kernel:
    """The kernel called `impl` for logits of these dtypes on `device` (`auto`: the fastest).

    Raises ValueError for a name that does not exist, or that cannot serve here.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r} does not exist; choose one of {', '.join(get_args(Implementation))}")
    if impl in {"native", "triton"}:
        reason = _native_lacks(device, dtypes) if impl == "native" else _triton_lacks(device)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot run: {reason}; use impl='auto'")
        return NATIVE if impl == "native" else _triton_kernel()
    if impl == "auto" and device.type == "cuda" and _triton_lacks(device) is None:
        return _triton_kernel()
    if impl == "auto" and device.type == "cpu":
        reason = _native_lacks(device, dtypes)
        if reason is None:
            return NATIVE
        _log.info("KL on the CPU uses the slower PyTorch kernel: %s", reason)
    return TORCH


def _native_lacks(device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    if not native.serves(device, dtypes):
        return f"it takes float32 and bfloat16 on the CPU, not {', '.join(map(str, dtypes))} on {device}"
    return native.unavailable()


def _triton_lacks(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA, not on {device}, unless TRITON_INTERPRET=1 was set at start to debug the kernels"
    return None


def _triton_kernel() -> Kernel:
    from megaqad.losses import triton_kernels

    return Kernel("triton", triton_kernels.statistics, triton_kernels.gradient, triton_kernels.merge, in_order=False)
