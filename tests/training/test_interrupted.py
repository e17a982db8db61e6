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


def test_one_run_killed_and_stopped(runner, reference, tmp_path):
    """Killed between the rename of a checkpoint and ``latest``; asked to stop; then let go."""
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, faults=[("kill", "latest", 1, 0, False)])
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
