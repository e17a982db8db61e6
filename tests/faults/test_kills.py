"""SIGKILL at any moment: the next command goes on, and the end is the uninterrupted run's, bit for bit."""

import signal
import time
from collections import Counter

import pytest

from tests.faults.conftest import MOMENTS
from tests.faults.injection import CALLS, ON_MAIN_RANK_ONLY, POINTS
from tests.faults.runs import outcome, wait_for

KILLED = 128 + signal.SIGKILL


def test_a_rank_killed_at_random_moments(runner, reference, moments, report, tmp_path):
    """From outside, by the clock: anywhere from the start of the command to its end."""
    started = time.monotonic()
    runner.finish(tmp_path / "timed")
    whole = time.monotonic() - started
    found, chains = Counter(), 0
    while sum(found.values()) < MOMENTS:
        run_dir = tmp_path / f"chain_{chains}"
        chains += 1
        for _ in range(min(5, MOMENTS - sum(found.values()))):
            command = runner.start(run_dir)
            time.sleep(moments.uniform(0, whole))
            command.signal(signal.SIGKILL, rank=moments.randrange(2))
            code = command.wait()
            assert code in (0, KILLED), command.output  # 0: that rank had not started yet or had just ended
            if code == 0:
                break
            assert "was ended by SIGKILL" in command.output
            found[phase(run_dir)] += 1
        runner.finish(run_dir)
        assert outcome(run_dir) == reference
    seen = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    for _ in range(sum(found.values())):
        report("SIGKILL of one rank at a random moment", seen)


def phase(run_dir):
    """How far a killed run was, from what it left."""
    checkpoints = run_dir / "checkpoints"
    if any(checkpoints.glob(".*.writing")):
        return "while writing a checkpoint"
    if any(checkpoints.glob("step_*")):
        return "after a checkpoint"
    return "before the first checkpoint"


@pytest.mark.parametrize("point", POINTS)
def test_a_rank_killed_in(point, runner, reference, moments, report, tmp_path):
    """At every kind of moment at least once, whatever the clock's chances."""
    rank = 0 if point in ON_MAIN_RANK_ONLY else moments.randrange(2)
    call, after = moments.randint(1, CALLS[point]), moments.random() < 0.5
    command = runner.start(tmp_path / "run", faults=[("kill", point, call, rank, after)])
    assert command.wait() == KILLED, command.output
    runner.finish(tmp_path / "run")
    assert outcome(tmp_path / "run") == reference
    report("SIGKILL of one rank in each kind of moment", point)


def test_the_launcher_killed(runner, reference, report, tmp_path):
    """Its ranks go with it, so that the next command finds the directory free at once."""
    command = runner.start(tmp_path / "run", faults=[("slow", "data", 0.2)])
    wait_for(tmp_path / "run" / "checkpoints" / "latest")
    command.signal(signal.SIGKILL)
    runner.finish(tmp_path / "run")
    assert outcome(tmp_path / "run") == reference
    report("SIGKILL of the launcher", "ranks ended with it, lock free at once")
