"""Asked to stop: saved at the next step boundary, exit code 3; asked twice: gone at once, with the last checkpoint."""

import signal
import time

import pytest

from tests.faults.injection import HANGS
from tests.faults.runs import metrics, newest_step, outcome, wait_for, wait_until

STOPPED = 3
SLOW = [("slow", "data", 0.3)]
"""So that there is time to hit a running step; it changes no number."""
MANY = ["checkpoint.every=1000"]
"""No checkpoint but the one the signal asks for."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_one_signal_to_the_command(name, runner, reference, report, tmp_path):
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, *MANY, faults=SLOW)
    wait_for_step(run_dir, 2)
    command.signal(vars(signal)[name])
    assert command.wait() == STOPPED, command.output
    stopped_at = newest_step(run_dir)
    assert stopped_at == len(metrics(run_dir)) >= 2
    assert command.output.count(f"megaqad: stopped by {name} after step {stopped_at} of 8, which is saved") == 1
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("SIGTERM, SIGUSR1, Ctrl-C", "exit code 3, saved at the next step")


def test_one_signal_to_one_rank(runner, reference, report, tmp_path):
    """As some cluster managers send it: all ranks agree on the step all the same."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, *MANY, faults=SLOW)
    wait_for_step(run_dir, 2)
    command.signal(signal.SIGTERM, rank=1)
    assert command.wait() == STOPPED, command.output
    assert newest_step(run_dir) == len(metrics(run_dir))
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("SIGTERM to one rank only", "exit code 3, saved at the next step")


def test_a_second_signal(runner, reference, report, tmp_path):
    """While the first is being served; here one rank is stuck, so that the step never ends."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, faults=[("hang", "data", 7, 1)])
    wait_until(lambda: HANGS in command.output)
    command.signal(signal.SIGTERM)
    time.sleep(1.5)
    assert command.poll() is None
    began = time.monotonic()
    command.signal(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM, command.output
    took = time.monotonic() - began
    assert took < 10
    assert "second signal" in command.output
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("a second SIGTERM", f"exit code 143 in {took:.1f} s")


def test_the_same_signal_delivered_twice(runner, reference, report, tmp_path):
    """Slurm and torchrun both do: to every process and through its parent."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, *MANY, faults=SLOW)
    wait_for_step(run_dir, 2)
    for rank in (0, 1):
        command.signal(signal.SIGTERM, rank=rank)
    command.signal(signal.SIGTERM)
    assert command.wait() == STOPPED, command.output
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("one SIGTERM delivered twice", "served once, exit code 3")


def test_time_limit(runner, reference, report, tmp_path):
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, *MANY, "train.stop_after=1s", faults=[("slow", "data", 1.0)])
    assert command.wait() == STOPPED, command.output
    stopped_at = newest_step(run_dir)
    assert 1 <= stopped_at < 8
    assert "stopped by train.stop_after" in command.output
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("train.stop_after", "exit code 3, saved at the next step")


def test_a_signal_before_training(runner, reference, report, tmp_path):
    """There is nothing to save yet: the command ends at once, as early stops do."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, faults=[("slow", "state", 1.0)])  # writing ptq/
    wait_for(run_dir / "run.json")
    command.signal(signal.SIGTERM)
    assert command.wait() == STOPPED, command.output
    assert "run the same command to go on" in command.output
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("SIGTERM before training", "exit code 3")


def wait_for_step(run_dir, step):
    wait_for(run_dir / "metrics.jsonl")
    wait_until(lambda: len((run_dir / "metrics.jsonl").read_text().splitlines()) >= step)
