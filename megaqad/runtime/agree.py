"""Ranks that fail together: one rank's mistake becomes the same line on all of them, and none is left waiting.

A rank that raises alone leaves its peers in the next collective until a timeout. What may fail on one rank only
(reading its share of a checkpoint, looking at a directory) runs in one of these.
"""

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
    outcome: list[tuple[bool, Result | str]] = []
    if dist.get_rank() == 0:
        try:
            outcome = [(True, work())]
        except UserError as error:
            outcome = [(False, str(error))]
    else:
        outcome = [(False, "")]
    dist.broadcast_object_list(outcome, src=0)
    worked, value = outcome[0]
    if not worked:
        raise UserError(str(value))
    return value  # type: ignore[return-value]
