"""Is every loss and every gradient of a step a number? If not: on which rank, in which microbatch?

Non-finite teacher logits make every loss so, and no later step can fix them: where a step failed they are looked for
first (``teacher_fault``), and the run ends there.

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

from megaqad.distillation.teachers import Teacher
from megaqad.runtime.ranks import Ranks

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

    def __init__(self, student: Sequence[DistributedDataParallel], ranks: Ranks) -> None:
        self._student = list(student)
        self._ranks = ranks
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
        looked_at = torch.stack(numbers or [torch.zeros((), device=self._ranks.device)])  # a frozen stage has none
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
            "stage": self._ranks.pipeline_rank,
            "losses": [index for index, loss in enumerate(losses) if not loss.isfinite()],
            "gradients": self._bad_micro_batches(),
            "norm": any(not norm < LARGEST_NORM for norm in norms),
        }
        reports: list[dict[str, Any]] = [{}] * self._ranks.world_size
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


@dataclass(frozen=True)
class TeacherFault:
    """Where a rank of the last stage found that the teacher's logits would not be numbers."""

    rank: int
    data_rank: int
    sequence: tuple[int, int] | None
    """(microbatch, sequence in it), the first with such a token; None when it is this rank's part of the head."""
    tokens: tuple[int, int] = (0, 0)
    """First and last such token that this rank holds, counted from the start of the sequence."""


@torch.no_grad()
def teacher_fault(
    teacher: Teacher, hidden: Sequence[Tensor], token_weights: Sequence[Tensor], ranks: Ranks
) -> TeacherFault | None:
    """This rank's first fault among the tokens that count. No collectives.

    A logit is finite exactly when its hidden state and the head are, short of an overflow, which shows in the loss.

    Args:
        hidden: [s(/tp), b, h] of every microbatch on the last stage, empty elsewhere.
        token_weights: [b, s] of every microbatch; 0 leaves a token out.
    """
    if not hidden:
        return None
    bad = [
        _sequence_slice(weights, ranks).ne(0) & ~states.sum(-1, dtype=torch.float32).isfinite()
        for weights, states in zip(token_weights, hidden, strict=True)
    ]  # [s(/tp), b] each
    head = teacher.head_weight().sum(dtype=torch.float32).isfinite()
    if bool(head & ~torch.stack([found.any() for found in bad]).any()):
        return None
    if not head:
        return TeacherFault(ranks.rank, ranks.data_rank, None)
    index, found = next((index, found) for index, found in enumerate(bad) if found.any())
    sequence = int(found.any(0).nonzero()[0])
    first = ranks.tensor_rank * found.shape[0] if ranks.sizes.sequence else 0
    positions = found[:, sequence].nonzero().flatten() + first
    return TeacherFault(ranks.rank, ranks.data_rank, (index, sequence), (int(positions[0]), int(positions[-1])))


def _sequence_slice(token_weights: Tensor, ranks: Ranks) -> Tensor:
    """[b, s] -> [s(/tp), b], this rank's tokens."""
    by_position = token_weights.transpose(0, 1)
    if not ranks.sizes.sequence:
        return by_position
    return by_position.chunk(ranks.sizes.tensor)[ranks.tensor_rank]


def explain_teacher(faults: Sequence[TeacherFault], step: int) -> str:
    """The line for the user: the fault of the lowest rank, over all tokens of its sequence.

    Under sequence parallelism the ranks of one replica hold parts of a sequence, so the first sequence with a fault,
    and the range of its tokens, are those of all of them.

    Args:
        faults: of all ranks that have one, in rank order.
        step: counted from 1.
    """
    lowest = faults[0]
    if lowest.sequence is None:
        where = f"of step {step}, rank {lowest.rank}"
        return f"the teacher's output head is not finite at the start {where}: look at the teacher's checkpoint"
    place = min(one.sequence for one in faults if one.data_rank == lowest.data_rank and one.sequence is not None)
    there = [one for one in faults if (one.data_rank, one.sequence) == (lowest.data_rank, place)]
    first, last = min(one.tokens[0] for one in there), max(one.tokens[1] for one in there)
    return (
        f"the teacher's logits are not finite: microbatch {place[0]} of step {step}, rank {there[0].rank}, sequence "
        f"{place[1]}, tokens {first} to {last}: look at the teacher's checkpoint and at these data"
    )


def _adder(sums: list[Tensor]) -> Callable[[Tensor | None], None]:
    """A hook that keeps the sum of each gradient. A parameter gets one per microbatch, in their order.

    None for the output head: the loss has put its gradient into the accumulated one, where the norm sees it; its
    share of the hidden states' gradient, and the loss, say in which microbatch.
    """

    def add(gradient: Tensor | None) -> None:
        if gradient is not None:
            sums.append(gradient.sum(dtype=torch.float32))

    return add
