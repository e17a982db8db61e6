"""Faults of the training itself: numbers that are none, spikes, ranks that hang or die, clocks that lie."""

import signal
import time

import pytest

from tests.faults.injection import POINTS
from tests.faults.runs import Runner, metrics, newest_step, outcome

NAN = {
    "data": ("nan_in_data", 8, 1, 0),  # step 3 begins at sample 8
    "gradient": ("nan_in_gradient", 3, 2, 1),
}


@pytest.mark.parametrize("where", NAN)
def test_not_a_number(where, runner, report, tmp_path):
    """The step is skipped, counted and located; interrupted or not, the run ends the same."""
    fault = NAN[where]
    runner.finish(tmp_path / "whole", faults=[fault])
    whole = outcome(tmp_path / "whole")
    skipped = [row for row in whole.metrics if "skipped" in row]
    assert [row["step"] for row in skipped] == [3]
    assert skipped[0]["loss"] is None or where == "gradient"
    assert skipped[0]["skipped"]["bad_steps"] == 1
    places = skipped[0]["skipped"]["places"]
    if where == "data":
        assert skipped[0]["skipped"]["what"] == "loss"
        assert {place["micro_batch"] for place in places} == {1}
    else:
        assert skipped[0]["skipped"]["what"] == "gradient"
        assert places == [{"rank": 1, "micro_batch": 2}]
    for step in (2, 3, 4):  # before the fault, at it, after it
        run_dir = tmp_path / f"killed_{step}"
        command = runner.start(run_dir, faults=[fault, ("kill", "log", step, 0, True)])
        assert command.wait() == 128 + signal.SIGKILL
        runner.finish(run_dir, faults=[fault])
        assert outcome(run_dir) == whole
    report(f"NaN in {where}, and SIGKILL around it", "step 3 skipped, logged with rank and microbatch")


def test_too_many_bad_steps_in_a_row(runner, report, tmp_path):
    run_dir = tmp_path / "run"
    faults = [("nan_in_data", 4 * step, 0, 0) for step in range(3, 8)]
    command = runner.start(run_dir, "train.max_bad_steps=3", faults=faults)
    assert command.wait() == 2, command.output
    assert "3 steps in a row were skipped" in command.output.splitlines()[-1]
    assert newest_step(run_dir) >= 2
    assert [row["step"] for row in metrics(run_dir) if "skipped" in row] == [4, 5, 6]


def test_loss_spike_rolls_back(server, model, report, tmp_path):
    """Back to the newest checkpoint without the training sequences that led there; the same after a kill."""
    settings = ["parallel.tensor=2", "train.steps=16", "train.spike_factor=5"]
    runner = Runner(server, tmp_path, model, settings)
    spike = ("loss_spike", 52, 100.0)  # step 14 begins at sample 52, the checkpoint before it is of step 12
    output = runner.finish(tmp_path / "whole", faults=[spike])
    assert "back to step 12, without training sequences 48 to 55" in output.replace("\n", " ")
    whole = outcome(tmp_path / "whole", steps=16)
    assert [row["step"] for row in whole.metrics] == list(range(1, 17))
    assert whole.metrics[12]["rolled_back"]["skipped_samples"] == [48, 56]
    command = runner.start(tmp_path / "killed", faults=[spike, ("kill", "log", 13, 0, True)])
    assert command.wait() == 128 + signal.SIGKILL
    runner.finish(tmp_path / "killed", faults=[spike])
    assert outcome(tmp_path / "killed", steps=16) == whole
    report("loss spike, and SIGKILL around it", "rolled back to step 12, window of 8 sequences skipped")


def test_a_hung_collective(runner, reference, report, tmp_path):
    """Every rank prints its stacks within the timeout; the one that never came is among them."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, "runtime.hang_timeout=15s", faults=[("hang", "data", 5, 1)])
    assert command.wait() == 1, command.output
    for rank in (0, 1):
        assert f"rank {rank} has made no progress for 15 s" in command.output
        assert "(QAD, 3 of 8 done)" in command.output
    assert "time.sleep(3600)" in command.output  # where rank 1 is
    assert "all_gather_single(" in command.output  # where rank 0 waits for it: they agree on the step's work
    assert "last collectives" in command.output
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("a hung collective (runtime.hang_timeout=15s)", "stacks of both ranks and last collectives, exit code 1")


@pytest.mark.parametrize("point", ["data", "student forward", "backward", "copy to host"])
def test_one_rank_dies_of_a_defect(point, runner, reference, report, tmp_path):
    """The job ends within seconds and shows the traceback of the rank that began it."""
    assert point in POINTS
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, faults=[("crash", point, 5, 1)])
    assert command.wait() == 1, command.output
    ended = time.monotonic()
    assert "rank 1 failed first:" in command.output
    assert f"RuntimeError: injected defect in {point}" in command.output
    assert "Connection closed by peer" not in command.output
    assert time.monotonic() - ended < 5
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("an exception on one rank", "its traceback, exit code 1")


def test_a_clock_that_goes_back(runner, reference, report, tmp_path):
    """An hour at every look, in both halves of an interrupted run."""
    run_dir = tmp_path / "run"
    back = ("clock_goes_back", 3600.0)
    command = runner.start(run_dir, faults=[back, ("kill", "optimizer", 5, 1, False)])
    assert command.wait() == 128 + signal.SIGKILL, command.output
    runner.finish(run_dir, faults=[back])
    assert outcome(run_dir) == reference
    report("clock going backwards, and SIGKILL", "no difference")


def test_recovery_with_both_branches(runner, report, tmp_path):
    """``recover`` with a QAT student for comparison, killed in each of its stages."""
    settings = ["report.compare_qat=true", "train.steps=4"]
    runner.finish(tmp_path / "whole", *settings, command="recover")
    whole = [outcome(tmp_path / "whole" / branch, steps=4) for branch in ("qat", ".")]
    run_dir = tmp_path / "killed"
    for point, call in (("manifest", 2), ("optimizer", 4), ("latest", 1), ("log", 4)):
        rank = 0 if point in ("manifest", "latest", "log") else 1
        command = runner.start(run_dir, *settings, command="recover", faults=[("kill", point, call, rank)])
        assert command.wait() == 128 + signal.SIGKILL, command.output
    runner.finish(run_dir, *settings, command="recover")
    assert [outcome(run_dir / branch, steps=4) for branch in ("qat", ".")] == whole
    for name in ("export/hf_quant_config.json", "report/recovery.json", "verify.json"):
        assert (run_dir / name).is_file()
    report("recover with QAT branch, SIGKILL in four stages", "both branches")
