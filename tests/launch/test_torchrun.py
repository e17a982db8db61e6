"""``launch/torchrun.sh`` with the real torchrun and ranks that behave as the test says."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun.sh"
PYTHON = """#!/usr/bin/env bash
# A Python that has no megaqad: what would be it is a shell script.
[[ $2 == megaqad ]] || exec {python} "$@"
echo $$ >>{folder}/pids
echo "$RANK/$WORLD_SIZE $LOCAL_RANK" >>{folder}/starts
{rank}
"""
WAIT_FOR_SIGNAL = """
trap 'echo told >>{folder}/told; exit 3' USR1
echo ready >>{folder}/ready
while :; do sleep 0.1; done
"""


class Launcher:
    """Starts ``torchrun.sh`` and looks at what its ranks leave in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, rank: str, **variables: str) -> subprocess.Popen[str]:
        python = self.folder / "python"
        python.write_text(
            PYTHON.format(python=sys.executable, folder=self.folder, rank=rank.format(folder=self.folder))
        )
        python.chmod(0o755)
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "PYTHON": str(python),
            "NPROC_PER_NODE": "2",
            "MASTER_PORT": str(self.port),
            **variables,
        }
        process = subprocess.Popen(
            [str(SCRIPT), "distill", "seed=1"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, what: str, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.05)

    def living(self) -> list[str]:
        """Ranks that still run; a zombie does not."""
        states = {pid: Path(f"/proc/{pid}/stat") for pid in self.lines("pids")}
        return [pid for pid, stat in states.items() if stat.exists() and stat.read_text().rsplit(")", 1)[1][1] != "Z"]


@pytest.fixture
def launcher(tmp_path: Path, unused_port: int) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path, unused_port)
    yield launcher
    for process in launcher.processes:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_form_one_world(launcher: Launcher) -> None:
    nodes = [launcher.start("exit 0", NNODES="2", NODE_RANK=str(node)) for node in range(2)]
    assert [node.wait(timeout=90) for node in nodes] == [0, 0]
    assert sorted(launcher.lines("starts")) == ["0/4 0", "1/4 1", "2/4 0", "3/4 1"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_each_rank_once_and_ends_with_3(launcher: Launcher, number: signal.Signals) -> None:
    process = launcher.start(WAIT_FOR_SIGNAL)
    launcher.wait_for("the ranks", lambda: len(launcher.lines("ready")) == 2)
    process.send_signal(number)
    assert process.wait(timeout=60) == 3
    assert launcher.lines("told") == ["told", "told"]
    assert len(launcher.lines("starts")) == 2, "a stop must not be repaired by a restart"


def test_second_signal_ends_everything(launcher: Launcher) -> None:
    process = launcher.start("trap '' USR1\necho ready >>{folder}/ready\nexec sleep 600")
    launcher.wait_for("the ranks", lambda: len(launcher.lines("ready")) == 2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) not in (0, 2, 3)
    launcher.wait_for("the ranks' end", lambda: not launcher.living(), seconds=5)


def test_dead_rank_restarts_all_and_leaves_none_behind(launcher: Launcher) -> None:
    rank = """
if [[ $(wc -l <{folder}/pids) -gt 2 ]]; then exit 0; fi
until [[ $(wc -l <{folder}/pids) -eq 2 ]]; do sleep 0.1; done
if [[ $RANK == 1 ]]; then kill -KILL $$; fi
exec sleep 600
"""
    process = launcher.start(rank)
    assert process.wait(timeout=90) == 0
    assert len(launcher.lines("starts")) == 4
    assert launcher.living() == []


def test_failures_are_bounded(launcher: Launcher) -> None:
    process = launcher.start("[[ $RANK == 0 ]] || exit 1\nexec sleep 600", MAX_RESTARTS="1")
    assert process.wait(timeout=90) == 1
    assert launcher.lines("starts").count("1/2 1") == 2


def test_mistake_is_not_repeated(launcher: Launcher) -> None:
    process = launcher.start("exit 2")
    assert process.wait(timeout=90) == 2
    assert len(launcher.lines("starts")) == 2, "a mistake must not be repaired by a restart"
