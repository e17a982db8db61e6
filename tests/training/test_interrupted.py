"""Real processes, killed and stopped: the short version of ``make test-faults``."""

import os
import signal
import stat

import pytest

from megaqad.distillation.finite import Fault, Place
from tests.faults.runs import Runner, metrics, newest_step, outcome, wait_until
from tests.forked import CommandServer
from tests.models.checkpoints import make_checkpoint

KILLED = 128 + signal.SIGKILL
STEPS = 6


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    server = CommandServer()
    folder = tmp_path_factory.mktemp("interrupted")
    model = make_checkpoint("llama", folder / "model")
    yield Runner(server, folder, model, ["parallel.tensor=2", f"train.steps={STEPS}", "evaluation.every=3"])
    server.close()


@pytest.fixture(scope="module")
def reference(runner):
    runner.finish(runner.folder / "reference")
    return outcome(runner.folder / "reference", STEPS)


def test_one_run_interrupted_in_every_way(runner, reference, tmp_path):
    """Killed while stepping, while writing, between rename and ``latest``; asked to stop; then let go."""
    run_dir = tmp_path / "run"
    for fault in (
        ("kill", "optimizer", 3, 1, True),  # step 3, step 2 is saved or not
        ("kill", "checkpoint write", 60, 1),
        ("kill", "latest", 1, 0, False),
    ):
        command = runner.start(run_dir, faults=[fault])
        assert command.wait() == KILLED, command.output
    command = runner.start(run_dir, faults=[("slow", "data", 0.3)])
    wait_until(lambda: "going on from" in command.output)
    wait_until(lambda: len(metrics(run_dir)) == 4)
    command.signal(signal.SIGTERM)
    code = command.wait()
    assert code == 3, command.output
    assert newest_step(run_dir) == len(metrics(run_dir))
    runner.finish(run_dir)
    assert outcome(run_dir, STEPS) == reference


def test_nan_in_one_gradient(runner, tmp_path):
    """The step is skipped and located; killed right after it or not, the run ends the same."""
    nan = ("nan_in_gradient", 3, 2, 1)
    runner.finish(tmp_path / "whole", faults=[nan])
    whole = outcome(tmp_path / "whole", STEPS)
    [row] = [row for row in whole.metrics if "skipped" in row]
    places = [{"rank": 1, "micro_batch": 2}]
    assert (row["step"], row["loss"], row["grad_norm"]) == (3, None, None)
    assert row["skipped"] == {"what": "gradient", "places": places, "bad_steps": 1}
    assert row["lr"] > whole.metrics[1]["lr"] > 0  # still warming up: the schedule moves on
    command = runner.start(tmp_path / "killed", faults=[nan, ("kill", "log", 3, 0, True)])
    assert command.wait() == KILLED, command.output
    runner.finish(tmp_path / "killed", faults=[nan])
    assert outcome(tmp_path / "killed", STEPS) == whole


def test_files_are_for_those_the_umask_says(runner):
    """Nothing is left readable by its owner alone, which safetensors' own writer does."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (runner.folder / "reference").rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_no_pickle_is_written(runner):
    """A checkpoint is safetensors and JSON; a pickle would run code where it is loaded."""
    suffixes = {path.suffix for path in (runner.folder / "reference" / "checkpoints").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ""}  # "" is ``latest``


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("loss", (Place(3, 0),)), "the loss is not finite on rank 3 microbatch 0"),
        (Fault("gradient", (Place(0, None),)), "the gradient is not finite on rank 0"),
        (
            Fault("gradient", tuple(Place(rank, 1) for rank in range(6))),
            "the gradient is not finite on rank 0 microbatch 1, rank 1 microbatch 1, rank 2 microbatch 1, rank 3 "
            "microbatch 1 and 2 more places",
        ),
    ],
)
def test_a_fault_in_words(fault, said):
    assert str(fault) == said
