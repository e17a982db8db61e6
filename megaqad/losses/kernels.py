"""The interchangeable kernels of forward KL, and which one runs.

| impl | where | what it is |
|---|---|---|
| `reference` | anywhere | FP64, dense, differentiated by autograd (reference.py): the test oracle, slow on purpose |
| `torch` | anywhere | cache-sized blocks of PyTorch operations |

`auto` takes the fastest that can run where the logits are.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from megaqad.losses import blocks

Implementation = Literal["auto", "reference", "torch"]


class Statistics(Protocol):
    """See `blocks.statistics`."""

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor: ...


class Gradient(Protocol):
    """See `blocks.gradient`."""

    def __call__(
        self, student: Tensor, teacher: Tensor, *, peaks: Tensor, factors: Tensor, temperature: float, out: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True)
class Kernel:
    """One implementation of the two local reductions of forward KL."""

    name: str
    statistics: Statistics
    gradient: Gradient


TORCH = Kernel("torch", blocks.statistics, blocks.gradient)


def choose(impl: str) -> Kernel:
    """The kernel called `impl` (`auto`: the fastest). ValueError for a name that does not exist."""
    if impl not in get_args(Implementation):
        raise ValueError(f"impl={impl!r} does not exist; choose one of {', '.join(get_args(Implementation))}")
    return TORCH
