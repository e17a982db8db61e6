"""Real ``megaqad`` commands as real processes, without their import time: forked from one that has imported everything.

A fault test starts a command dozens of times and kills it; ten seconds of imports each would make it minutes. The
server process here imports megaqad once and forks a child per command. The child runs ``megaqad.cli.main`` as the
installed command does, launcher included: only ``subprocess.Popen`` is replaced inside the launcher, by a fork that
runs the rank. Every process is a process of its own, with its own signals, sockets and file descriptors.

``faults`` name functions of ``tests.faults.injection`` that the ranks apply to themselves before they begin; nothing of
it exists in the product.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.overrides import merged

REPOSITORY = Path(__file__).parent.parent
LONGEST_SECONDS = 240.0


@dataclass
class Command:
    """A command that was started."""

    server: "CommandServer"
    pid: int
    folder: Path
    code: int | None = None
    """Its exit code, once it was seen to have ended; from then on its process id may be another's."""

    @property
    def output(self) -> str:
        """Standard output and error so far."""
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have been started, by rank."""
        found = {}
        for path in self.folder.glob("rank_*"):
            text = path.read_text()
            if text:
                found[int(path.name.removeprefix("rank_"))] = int(text)
        return found

    def signal(self, number: int, rank: int | None = None) -> bool:
        """Send a signal to the command, or to one of its ranks; whether there was someone to get it."""
        pid = self.pid if rank is None else self.ranks().get(rank)
        if pid is None or self.poll() is not None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.poll(self.pid)
        return self.code

    def wait(self, seconds: float = LONGEST_SECONDS) -> int:
        """Its exit code, negative for a signal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            code = self.poll()
            if code is not None:
                return code
            time.sleep(0.01)
        for pid in (*self.ranks().values(), self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"no end after {seconds:.0f} s:\n{self.output}")


class CommandServer:
    """The process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.forked"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        faults: Sequence[Sequence[Any]] = (),
        environment: dict[str, str] | None = None,
    ) -> Command:
        """Run ``megaqad <arguments>``.

        Args:
            folder: new directory for output and process ids.
            faults: (function of ``tests.faults.injection``, arguments...) for every rank.
        """
        arguments = merged(arguments)
        folder.mkdir(parents=True)
        request = {
            "folder": str(folder),
            "arguments": [str(argument) for argument in arguments],
            "faults": [list(fault) for fault in faults],
            "environment": environment or {},
        }
        return Command(self, self._ask(request), folder)

    def poll(self, pid: int) -> int | None:
        """The exit code of a command, None while it runs; to be asked until it is there, and not again."""
        code: int | None = self._ask({"poll": pid})
        return code

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class _ForkedRank:
    """Stands in for ``subprocess.Popen`` in the launcher: the rank is a fork, not a new interpreter."""

    folder: Path
    faults: Sequence[Sequence[Any]]

    def __init__(
        self, command: Sequence[str], *, env: dict[str, str], start_new_session: bool, pass_fds: Sequence[int]
    ) -> None:
        """``pass_fds``: a fork has them anyway."""
        assert command[1:3] == ["-m", "megaqad"]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            _become(env)
            (self.folder / f"rank_{env['RANK']}").write_text(str(os.getpid()))
            _run_command(list(command[3:]), self.faults)

    def poll(self) -> int | None:
        if self.returncode is None:
            self._reap(os.WNOHANG)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self._reap(0)
        assert self.returncode is not None
        return self.returncode

    def _reap(self, options: int) -> None:
        pid, status = os.waitpid(self.pid, options)
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(environment: dict[str, str]) -> None:
    """Take on an environment and forget the signal handlers of the process this one was forked from."""
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _run_command(arguments: list[str], faults: Sequence[Sequence[Any]]) -> None:
    """Be the command; never returns."""
    code = 70
    try:
        from megaqad import cli

        for name, *values in faults:
            injection = importlib.import_module("tests.faults.injection")
            vars(injection)[name](*values)
        code = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _fork_command(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    folder = Path(request["folder"])
    descriptor = os.open(folder / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _become({**os.environ, **request["environment"]})
    from megaqad.runtime import launch

    _ForkedRank.folder, _ForkedRank.faults = folder, request["faults"]
    vars(launch)["subprocess"] = _LauncherSubprocess
    alone = not any(
        argument.startswith("parallel.") and not argument.endswith("=1") for argument in request["arguments"]
    )
    if alone:
        (folder / "rank_0").write_text(str(os.getpid()))
    _run_command(request["arguments"], request["faults"] if alone else ())
    raise AssertionError("not reached")


class _LauncherSubprocess:
    """What the launcher uses of the module ``subprocess``."""

    Popen = _ForkedRank


def _serve() -> None:
    """Import, then fork a command per request line, until standard input ends."""
    import torch

    torch.set_num_threads(1)
    for name in ("distill", "recover", "demo", "quantize", "evaluate", "export", "pretrain"):
        importlib.import_module(f"megaqad.commands.{name}")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = _fork_command(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
