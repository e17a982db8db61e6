"""Ranks that fail together: one rank's mistake becomes the same line on all of them, and none is left waiting.

A rank that raises alone leaves its peers in the next collective until a timeout. What may fail on one rank only
(reading its share of a checkpoint, looking at a directory) runs in one of these.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from megaqad.errors import UserError

Result = TypeVar("Result")


def device_of_group() -> torch.device:
    """Where the default group's tensors must be."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def any_rank(condition: bool) -> bool:
    """Whether ``condition`` holds on at least one rank. Collective: one all-reduce of one number."""
    flag = torch.tensor([int(condition)], device=device_of_group())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def gather_problems(problem: Result | None) -> list[Result]:
    """The problems of all ranks that have one, in rank order, on every rank.

    Collective: one all-reduce, and when there is a problem one gather of objects.
    """
    if not any_rank(problem is not None):
        return []
    problems: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return [found for found in problems if found is not None]


def gather_lists(mine: list[Result]) -> list[Result]:
    """What all ranks have, in rank order, on every rank.

    Collective: one all-reduce, and when any rank has something one gather of objects.
    """
    return [found for of_rank in gather_problems(mine or None) for found in of_rank]


def raise_together(problem: str | None) -> None:
    """Raise on all ranks when any has a problem; the lowest such rank's is shown. Collectives: ``gather_problems``.

    Raises:
        UserError: on every rank, with the same message.
    """
    problems = gather_problems(problem)
    if problems:
        raise UserError(problems[0])


@contextmanager
def together() -> Iterator[None]:
    """Every rank runs the block; a ``UserError`` on one is raised on all. No collective may stand in the block."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    raise_together(problem)


def on_main(work: Callable[[], Result]) -> Result:
    """What ``work`` gives on the first rank, on every rank; its ``UserError`` too. Collective: two broadcasts."""
    return _from_main(_outcome(work) if dist.get_rank() == 0 else None)


BEAT_SECONDS = 2.0
"""Between signs of life of a rank that others wait for."""


def on_main_for_long(work: Callable[[Callable[[], None]], Result], still_waiting: Callable[[], None]) -> Result:
    """The same for work that may take longer than a collective waits, however long.

    ``work`` is given a function to call as it makes progress. Every few seconds a call becomes a broadcast of one
    number, so that no collective is waited for longer than ``work`` takes for a step, and the other ranks call
    ``still_waiting``, to feed their watchdogs: these end a rank whose first rank is stuck.
    """
    if dist.get_rank() != 0:
        while _broadcast_flag(False):
            still_waiting()
        return _from_main(None)
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= BEAT_SECONDS:
            _broadcast_flag(True)
            last = time.monotonic()

    outcome = _outcome(lambda: work(beat))
    _broadcast_flag(False)
    return _from_main(outcome)


def _broadcast_flag(flag: bool) -> bool:
    """The first rank's flag, on every rank."""
    number = torch.tensor([int(flag)], device=device_of_group())
    dist.broadcast(number, src=0)
    return bool(number.item())


def _outcome(work: Callable[[], Result]) -> tuple[bool, Result | str]:
    """(True, what it gives), or (False, its user error)."""
    try:
        return True, work()
    except UserError as error:
        return False, str(error)


def _from_main(outcome: tuple[bool, Result | str] | None) -> Result:
    """The first rank's outcome on every rank: its result, or its error raised."""
    outcomes = [outcome]
    dist.broadcast_object_list(outcomes, src=0)
    assert outcomes[0] is not None
    worked, value = outcomes[0]
    if not worked:
        raise UserError(str(value))
    return value  # type: ignore[return-value]
