"""What goes on by itself: the real megaqad under the real torchrun, with one rank killed on the first try."""

import os
import socket
import subprocess
import sys

from tests.faults.runs import STEPS, outcome
from tests.forked import REPOSITORY

PYTHON = """#!/usr/bin/env bash
# A Python whose megaqad loses a rank on torchrun's first try.
[[ $2 == megaqad ]] || exec {python} "$@"
exec {python} {script} "${{@:3}}"
"""
RANK = """
import os, sys
sys.path.insert(0, {repository!r})
from tests.forked import _run_command
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
_run_command(sys.argv[1:], [["kill", "optimizer", 5, 1, False]] if first else [])
"""


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_torchrun_goes_on_by_itself(runner, reference, report, tmp_path):
    """``launch/torchrun.sh`` with --max-restarts: one command, and the end is the uninterrupted run's."""
    script, python = tmp_path / "rank.py", tmp_path / "python"
    script.write_text(RANK.format(repository=str(REPOSITORY)))
    python.write_text(PYTHON.format(python=sys.executable, script=script))
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "NPROC_PER_NODE": "2", "MASTER_PORT": str(unused_port()), "MAX_RESTARTS": "1"}
    run_dir = tmp_path / "run"
    finished = subprocess.run(
        [REPOSITORY / "launch" / "torchrun.sh", *runner.arguments(run_dir)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert f"going on from {run_dir}/checkpoints/step_" in finished.stdout.replace("\n", "")
    assert outcome(run_dir, STEPS) == reference
    report("SIGKILL of one rank under torchrun --max-restarts=1", "restarted by torchrun alone, exit code 0")
