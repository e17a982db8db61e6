"""Work of one rank while the others wait."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megaqad.errors import UserError
from megaqad.runtime import agree
from tests.ranks import run_ranks

PATIENCE = 1.0


def slow_work(rank: int, world: int, store: str, fails: bool) -> tuple[str, int]:
    """The first rank works for more than twice as long as a collective waits."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    agree.BEAT_SECONDS = 0.2
    heard = []

    def work(beat) -> str:
        for _ in range(25):
            time.sleep(PATIENCE / 10)
            beat()
        if fails:
            raise UserError("it is damaged")
        return f"done by {dist.get_rank()}"

    try:
        found = agree.on_main_for_long(work, lambda: heard.append(time.monotonic()))
    except UserError as error:
        found = str(error)
    finally:
        agree.BEAT_SECONDS = 2.0
    return found, len(heard)


@pytest.mark.parametrize(("fails", "outcome"), [(False, "done by 0"), (True, "it is damaged")])
def test_work_may_take_longer_than_a_collective_waits(fails: bool, outcome: str, tmp_path: Path) -> None:
    results = run_ranks(3, slow_work, str(tmp_path / "store"), fails)
    assert [found for found, _ in results] == [outcome] * 3
    assert [heard > 5 for _, heard in results] == [False, True, True]
