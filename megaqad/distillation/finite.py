"""Is every loss and every gradient of a step a number? If not: on which rank, in which microbatch?

A NaN in one weight's gradient is in every weight after one update, so it has to be seen before the optimizer steps.
Three looks, each where it is cheap:

- every microbatch's loss, on the last stage;
- the gradient of every parameter as it arrives from each microbatch's backward pass, by a hook that adds it up: the sum
  of a tensor is finite exactly when all its elements are (short of an overflow, which is as bad);
- the norm of the accumulated, reduced gradient, which also sees what became infinite on the way.

The first two say where, the third misses nothing. All sums stay on the device and are looked at once per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megaqad.runtime.parallel import ParallelContext

LARGEST_NORM = 1e18
"""Of the gradient on one rank: its square still fits an FP32 sum over ranks."""


@dataclass(frozen=True)
class Place:
    """Where something was not finite."""

    rank: int
    micro_batch: int | None
    """Counted on that rank from 0; None when only the accumulated gradient shows it."""


@dataclass(frozen=True)
class Fault:
    """What was wrong with a step."""

    what: str
    """``loss`` or ``gradient``."""
    places: tuple[Place, ...]

    def __str__(self) -> str:
        where = [
            f"rank {place.rank}" + (f" microbatch {place.micro_batch}" if place.micro_batch is not None else "")
            for place in self.places[:4]
        ]
        more = f" and {len(self.places) - 4} more places" if len(self.places) > 4 else ""
        return f"the {self.what} is not finite on {', '.join(where)}{more}"


class FiniteWatch:
    """Watches the student of one ``DistillationStep``."""

    def __init__(self, student: Sequence[DistributedDataParallel], context: ParallelContext) -> None:
        self._student = list(student)
        self._context = context
        parameters = [one for chunk in self._student for one in chunk.parameters() if one.requires_grad]
        self._sums: list[list[Tensor]] = [[] for _ in parameters]
        for parameter, sums in zip(parameters, self._sums, strict=True):
            parameter.register_hook(_adder(sums))

    def begin(self) -> None:
        """Forget the last step; call before its backward passes."""
        for sums in self._sums:
            sums.clear()

    @torch.no_grad()
    def fault(self, losses: Sequence[Tensor]) -> Fault | None:
        """What was not finite since ``begin``; call when the gradients are reduced. The same on every rank.

        Args:
            losses: scalar of every microbatch on the last stage, empty elsewhere.

        Collectives: one all-reduce of one number over all ranks; one gather more when something is wrong.
        """
        norms = [torch.linalg.vector_norm(data) for data in self._gradient_buffers()]
        numbers = [*norms, *(loss.float().reshape(()) for loss in losses)]
        looked_at = torch.stack(numbers or [torch.zeros((), device=self._context.device)])  # a frozen stage has none
        bad = torch.logical_not(looked_at.abs() < LARGEST_NORM).any().to(torch.int32)  # NaN compares false
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return self._locate(losses, norms) if bad.item() else None

    def _gradient_buffers(self) -> list[Tensor]:
        return [
            buffer.grad_data for chunk in self._student for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    def _locate(self, losses: Sequence[Tensor], norms: Sequence[Tensor]) -> Fault:
        """Ask all ranks where it began: in a loss, else in the latest pipeline stage whose own gradients show it."""
        report = {
            "stage": self._context.pipeline_rank,
            "losses": [index for index, loss in enumerate(losses) if not loss.isfinite()],
            "gradients": self._bad_micro_batches(),
            "norm": any(not norm < LARGEST_NORM for norm in norms),
        }
        reports: list[dict[str, Any]] = [{}] * self._context.world_size
        dist.all_gather_object(reports, report)
        for what, key in (("loss", "losses"), ("gradient", "gradients")):
            stages = [one["stage"] for one in reports if one[key]]
            if stages:
                places = [
                    Place(rank, index)
                    for rank, one in enumerate(reports)
                    if one["stage"] == max(stages)
                    for index in one[key]
                ]
                return Fault(what, tuple(places))
        return Fault("gradient", tuple(Place(rank, None) for rank, one in enumerate(reports) if one["norm"]))

    def _bad_micro_batches(self) -> list[int]:
        """Microbatches from which some parameter on this rank got a gradient that is not finite."""
        bad = set()
        for sums in self._sums:
            if sums:
                bad |= set((~torch.stack(sums).isfinite()).nonzero().flatten().tolist())
        return sorted(bad)


def _adder(sums: list[Tensor]) -> Callable[[Tensor | None], None]:
    """A hook that keeps the sum of each gradient. A parameter gets one per microbatch, in their order.

    None for the output head: the loss has put its gradient into the accumulated one, where the norm sees it; its
    share of the hidden states' gradient, and the loss, say in which microbatch.
    """

    def add(gradient: Tensor | None) -> None:
        if gradient is not None:
            sums.append(gradient.sum(dtype=torch.float32))

    return add
