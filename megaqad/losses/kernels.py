"""The interchangeable kernels of forward KL, and which one runs.

| impl | where | what it is |
|---|---|---|
| `reference` | anywhere | FP64, dense, differentiated by autograd (reference.py): the test oracle, slow on purpose |
| `torch` | anywhere | cache-sized blocks of PyTorch operations (blocks.py) |
| `native` | CPU with a C++ compiler | one pass per row in vector registers (native.cpp) |

`auto` takes the fastest that can run where the logits are; a name takes that one or refuses.
"""

import logging
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from megaqad.losses import blocks, native

_log = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "torch", "native"]


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


@dataclass(frozen=True)
class Kernel:
    """One implementation of the two local reductions of forward KL."""

    name: str
    statistics: Statistics
    gradient: Gradient


TORCH = Kernel("torch", blocks.statistics, blocks.gradient)


NATIVE = Kernel("native", native.statistics, native.gradient)


def choose(impl: str, device: torch.device, dtypes: set[torch.dtype]) -> Kernel:
    """The kernel called `impl` for logits of these dtypes (`auto`: the fastest).

    Raises ValueError for a name that does not exist, or that cannot serve here.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r} does not exist; choose one of {', '.join(get_args(Implementation))}")
    if impl == "native" or (impl == "auto" and device.type == "cpu"):
        reason = native.unavailable()
        if reason is None and not native.serves(device, dtypes):
            reason = f"it takes float32 and bfloat16 on the CPU, not {', '.join(map(str, dtypes))} on {device}"
        if reason is None:
            return NATIVE
        if impl == "native":
            raise ValueError(f"impl='native' cannot run: {reason}; use impl='torch'")
        _log.info("KL on the CPU uses the slower PyTorch kernel: %s", reason)
    return TORCH
