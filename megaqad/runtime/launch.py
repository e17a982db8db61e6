"""Start a command's ranks on this machine, and end them all when one fails.

A command started plainly that needs more than one rank runs as one process per rank, each with the environment that
torchrun would give it. Under torchrun or srun this file does nothing: the ranks exist already.

A rank that fails writes its traceback to a file of its own with the time. The launcher ends the others within
seconds and shows only the earliest traceback: the rest are the echo of a broken connection. Signals sent to the
launcher reach every rank.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megaqad.errors import UserError

FAILURE_FILE_VARIABLE = "MEGAQAD_FAILURE_FILE"
GRACE_SECONDS = 3.0
"""How long the others may take to report a failure of their own or to end before they are killed."""
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def is_rank() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    return "RANK" in os.environ


def adopt_slurm_environment() -> None:
    """Under ``srun`` without torchrun, name rank, world and rendezvous as torch expects them."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"srun started {os.environ['WORLD_SIZE']} ranks but {name} is not set: export it before srun"
            )


def write_failure(message: str) -> None:
    """On a rank: leave the reason of a failure where the launcher looks for it."""
    path = os.environ.get(FAILURE_FILE_VARIABLE)
    if path is not None:
        Path(path).write_text(json.dumps({"time": time.time(), "message": message}), encoding="utf-8")


def report_failure(error: BaseException) -> None:
    """Show a defect: to the launcher when there is one, else on standard error."""
    text = "".join(traceback.format_exception(error)).rstrip()
    if FAILURE_FILE_VARIABLE in os.environ:
        write_failure(text)
    else:
        print(text, file=sys.stderr)


def run_ranks_here(arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m megaqad <arguments>`` as ``ranks`` processes; the exit code to end with.

    0 when all ranks end well, else the code of the rank that failed first.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="megaqad-") as folder:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                FAILURE_FILE_VARIABLE: f"{folder}/{rank}.json",
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
            processes.append(subprocess.Popen([sys.executable, "-m", "megaqad", *arguments], env=environment))
        with _forwarding_signals(processes):
            first = _wait_for_first_failure(processes)
        _end(processes)
        if first is None:
            return 0
        _show_first_failure(Path(folder), first, processes[first].returncode)
        return _exit_code(processes[first].returncode)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _forwarding_signals(processes: list[subprocess.Popen[bytes]]):  # type: ignore[no-untyped-def]  # noqa: ANN202
    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_first_failure(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The first rank seen to end badly, None when all end well."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let the ranks that are still alive notice, then end them."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _show_first_failure(folder: Path, rank: int, code: int) -> None:
    """Print the earliest failure that any rank reported; a rank that was killed could report none."""
    failures = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(json.JSONDecodeError):
            failures.append((json.loads(path.read_text(encoding="utf-8")), int(path.stem)))
    reported = {number for _, number in failures}
    if rank not in reported and code < 0:
        print(
            f"megaqad: rank {rank} was ended by {signal.Signals(-code).name}; all ranks were stopped", file=sys.stderr
        )
    elif failures:
        failure, number = min(failures, key=lambda entry: entry[0]["time"])
        message = failure["message"]
        print(f"rank {number} failed first:\n{message}" if "\n" in message else message, file=sys.stderr)
    else:
        print(f"megaqad: rank {rank} ended with code {code} without a message", file=sys.stderr)


def _exit_code(code: int) -> int:
    """A process's return code as a shell would give it."""
    return code if code >= 0 else 128 - code
