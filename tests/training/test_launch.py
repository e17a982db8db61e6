"""The launcher's account of an early end: one reason, one exit code, whatever the echo of it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaqad.runtime import launch, signals
from megaqad.runtime.launch import Note, _explain

KILL, TERM = -signal.SIGKILL, -signal.SIGTERM


BOOM = Note(1.0, "Traceback\nBoom", 1)
ECHO = Note(2.0, "Connection closed by peer", 1)
NO = Note(1.0, "megaqad: no", 2)
STOP = Note(1.0, "megaqad: stopped", 3)


@pytest.mark.parametrize(
    ("notes", "codes", "first_seen", "asked", "code", "said"),
    [
        ({0: ECHO, 1: BOOM}, {0: 1, 1: 1}, 0, [], 1, "rank 1 failed first:\nTraceback\nBoom"),
        ({0: NO, 1: Note(1.1, "megaqad: no", 2)}, {0: 2, 1: 2}, 1, [], 2, "megaqad: no"),
        # A killed rank leaves no note; the survivors' are its echo.
        ({0: ECHO}, {0: 1, 1: KILL}, 0, [], 137, "megaqad: rank 1 was ended by SIGKILL; all ranks were stopped"),
        # Stopped early beats what the others met when it was gone.
        ({0: STOP, 1: ECHO}, {0: 3, 1: 1}, 1, [15], 3, "megaqad: stopped"),
        ({}, {0: TERM, 1: TERM}, 0, [signal.SIGTERM], 3, "megaqad: stopped by SIGTERM before the work began"),
        ({}, {0: 143}, 0, [15, 15], 143, "megaqad: stopped at once by a second signal; the last checkpoint is intact"),
        ({}, {0: 9}, 0, [], 9, "megaqad: rank 0 ended with code 9 without a message"),
    ],
)
def test_one_reason(notes, codes, first_seen, asked, code, said, capsys):
    assert _explain(notes, codes, first_seen, asked) == code
    assert capsys.readouterr().err.strip() == said


def test_the_first_note_stays(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.NOTE_FILE_VARIABLE, str(tmp_path / "0.json"))
    monkeypatch.setenv(launch.TORCHELASTIC_FILE_VARIABLE, str(tmp_path / "elastic.json"))
    launch.write_note("the reason", 1)
    launch.write_note("the echo", 1)
    assert launch._notes(tmp_path)[0].message == "the reason"
    elastic = json.loads((tmp_path / "elastic.json").read_text())["message"]
    assert elastic["message"] == "the reason"
    assert int(elastic["extraInfo"]["timestamp"]) > 0


RANK = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from megaqad.runtime import launch, signals
from megaqad.errors import StoppedEarly
launch.end_with_launcher()
signals.listen()
behaviour = sys.argv[2]
open(os.path.join(sys.argv[3], os.environ["RANK"]), "w").write(str(os.getpid()))
try:
    if behaviour == "fail" and os.environ["RANK"] == "1":
        raise RuntimeError("boom")
    if behaviour == "stuck":
        with signals.deferred():
            time.sleep(60)
    time.sleep(60)
except StoppedEarly as stop:
    launch.report_line(f"megaqad: {stop}", 3)
    sys.exit(3)
except RuntimeError as error:
    launch.report_failure(error)
    sys.exit(1)
"""


@pytest.fixture
def started(tmp_path):
    """The launcher in a process of its own, with ranks that are no megaqad but obey it; until both are there."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    pids = tmp_path / "pids"
    pids.mkdir()
    repository = str(Path(__file__).parents[2])
    processes = []

    def start(behaviour):
        code = (
            "import subprocess, sys; sys.path.insert(0, sys.argv[1])\n"
            "from megaqad.runtime import launch\n"
            "popen = subprocess.Popen\n"
            "subprocess.Popen = lambda command, **options: popen([sys.executable, *sys.argv[2:]], **options)\n"
            "sys.exit(launch.run_ranks_here([], 2))\n"
        )
        arguments = [sys.executable, "-c", code, repository, str(script), repository, behaviour, str(pids)]
        processes.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while len(list(pids.iterdir())) < 2 or any(not path.read_text() for path in pids.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return processes[-1], [int((pids / str(rank)).read_text()) for rank in (0, 1)]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_one_dead_rank_ends_the_job_in_seconds(started):
    began = time.monotonic()
    process, ranks = started("fail")
    assert process.wait(30) == 1
    assert "rank 1 failed first:" in process.stderr.read()
    assert time.monotonic() - began < 30
    assert not any(map(alive, ranks))


def test_a_signal_reaches_every_rank_once(started):
    process, ranks = started("obey")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 3
    assert process.stderr.read() == "megaqad: stopped by SIGUSR1: run the same command to go on\n"
    assert not any(map(alive, ranks))


def test_a_second_signal_ends_a_stuck_rank(started):
    """The main thread of each rank sleeps in C; the request was noted, the second one is not asked twice."""
    process, ranks = started("stuck")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert "second signal" in process.stderr.read()
    assert not any(map(alive, ranks))


@pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their launcher on Linux only")
def test_ranks_end_with_a_killed_launcher(started):
    process, ranks = started("obey")
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_launcher_is_stopped_before_it_starts_ranks(number):
    """While it reads the data; afterwards signals are the ranks' again."""
    code = (
        "import os, signal, sys\n"
        "from megaqad.errors import StoppedEarly\n"
        "from megaqad.runtime import signals\n"
        "number = int(sys.argv[1])\n"
        "before = signal.getsignal(number)\n"
        "try:\n"
        "    with signals.raised():\n"
        "        os.kill(os.getpid(), number)\n"
        "        print('went on')\n"
        "except StoppedEarly as stop:\n"
        "    print(stop, signal.getsignal(number) is before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(int(number))], check=True, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == f"stopped by {number.name}: run the same command to go on True\n"
