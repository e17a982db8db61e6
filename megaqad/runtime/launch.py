"""Start a command's ranks on this machine, and end them all when one fails.

A command started plainly that needs more than one rank runs as one process per rank, each with the environment that
torchrun would give it. Under torchrun or srun this file does nothing: the ranks exist already.

A rank that ends early leaves a note with the reason in a file of its own. The launcher ends the others within seconds
and shows only the earliest note: the rest are the echo of a broken connection. Times are of the machine's monotonic
clock, which no correction sets back. Signals sent to the launcher reach every rank once: the ranks live in a session
of their own, so that the terminal's Ctrl-C does not reach them a second time. A launcher that is killed takes its
ranks with it, and with them their lock on the output directory.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megaqad.errors import EXIT_STOPPED_EARLY, UserError

NOTE_FILE_VARIABLE = "MEGAQAD_NOTE_FILE"
LAUNCHER_VARIABLE = "MEGAQAD_LAUNCHER"
STORE_VARIABLE = "MEGAQAD_STORE"
"""For the first rank: number of the open socket on which the ranks will find it. A port that were only looked up for
it could be another process's by the time it listens."""
TORCHELASTIC_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
GRACE_SECONDS = 3.0
"""How long the others may take to report a failure of their own or to end before they are killed."""
STOP_GRACE_SECONDS = 300.0
"""The same after a rank that stopped early on request: the others may be sending their last log lines."""
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DIE_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of Linux's prctl."""


@dataclass(frozen=True)
class Note:
    """Why a rank ended early."""

    time: float
    """Monotonic seconds of this machine."""
    message: str
    code: int
    """Exit code the command should end with."""


def is_rank() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    return "RANK" in os.environ


def has_launcher() -> bool:
    """Whether this file's launcher started this process and shows its failures."""
    return NOTE_FILE_VARIABLE in os.environ


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


def end_with_launcher() -> None:
    """On a rank: be killed when the launcher is, however that happens. Linux only; elsewhere ranks live on."""
    if LAUNCHER_VARIABLE not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER_VARIABLE]):  # it died before the request was made
        os.kill(os.getpid(), signal.SIGKILL)


def write_note(message: str, code: int) -> None:
    """On a rank: leave the reason of an early end where the launcher, or torchrun, looks for it; the first stays."""
    path = os.environ.get(NOTE_FILE_VARIABLE)
    if path is not None and not Path(path).exists():
        Path(path).write_text(json.dumps(asdict(Note(time.monotonic(), message, code))), encoding="utf-8")
    elastic = os.environ.get(TORCHELASTIC_FILE_VARIABLE)
    if elastic and not Path(elastic).exists():
        # The form torchrun reads: it names the earliest failure as the root cause.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(elastic).write_text(json.dumps(content), encoding="utf-8")


def report_failure(error: BaseException) -> None:
    """Show a defect: to the launcher when there is one, else on standard error."""
    text = "".join(traceback.format_exception(error)).rstrip()
    write_note(text, 1)
    if not has_launcher():
        print(text, file=sys.stderr)


def report_line(message: str, code: int) -> None:
    """Show one line of a command that ends early, once: from the launcher, else from the first rank alone."""
    write_note(message, code)
    if not has_launcher() and os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def run_ranks_here(arguments: Sequence[str], ranks: int) -> int:
    """Run ``python -m megaqad <arguments>`` as ``ranks`` processes; the exit code to end with.

    0 when all ranks end well, else that of the rank which was the first to end early.
    """
    with tempfile.TemporaryDirectory(prefix="megaqad-") as folder:
        processes: list[subprocess.Popen[bytes]] = []
        with _forwarding_signals(processes) as forwarded:
            with socket.create_server(("127.0.0.1", 0)) as store:
                for environment in _environments(ranks, folder, store):
                    command = [sys.executable, "-m", "megaqad", *arguments]
                    given = [store.fileno()] if STORE_VARIABLE in environment else []
                    variables = {**os.environ, **environment}
                    processes.append(subprocess.Popen(command, env=variables, start_new_session=True, pass_fds=given))
            for number in list(forwarded):  # came while the last of them was being started
                _send(processes, number)
            first = _wait_for_early_end(processes)
            killed_here = _end(processes, STOP_GRACE_SECONDS if _stopped(processes) else GRACE_SECONDS)
        if first is None:
            return 0
        codes = {rank: process.returncode for rank, process in enumerate(processes) if rank not in killed_here}
        return _explain(_notes(Path(folder)), codes, first, forwarded)


def _environments(ranks: int, folder: str, store: socket.socket) -> Iterator[dict[str, str]]:
    """What each rank finds in its environment beside this process's own."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.getsockname()[1]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), NOTE_FILE_VARIABLE: f"{folder}/{rank}.json"}
        yield shared | own | ({STORE_VARIABLE: str(store.fileno())} if rank == 0 else {})


@contextlib.contextmanager
def _forwarding_signals(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to the ranks inside the block; gives the list of those that came."""
    came: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        _send(processes, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _wait_for_early_end(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The first rank seen to end with another code than 0, None when all end well."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _stopped(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() == EXIT_STOPPED_EARLY for process in processes)


def _end(processes: list[subprocess.Popen[bytes]], grace: float) -> set[int]:
    """Let the ranks that are still alive notice, then kill them; those it had to kill."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    killed = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in killed:
        processes[rank].kill()
    for process in processes:
        process.wait()
    return killed


def _notes(folder: Path) -> dict[int, Note]:
    """What the ranks left, by rank."""
    notes = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(json.JSONDecodeError, TypeError):
            notes[int(path.stem)] = Note(**json.loads(path.read_text(encoding="utf-8")))
    return notes


def _explain(notes: dict[int, Note], codes: dict[int, int], first_seen: int, asked: list[int]) -> int:
    """Print why the command ends early, in one place; its exit code.

    Args:
        codes: return codes by rank, negative for a signal, of the ranks that ended by themselves.
        first_seen: the rank that was seen to end first.
        asked: signals that this launcher passed on.
    """
    ended_by_signal = [rank for rank, code in codes.items() if code < 0 and rank not in notes]
    if ended_by_signal:  # a rank that was killed could leave no note; those that others left are its echo
        rank = ended_by_signal[0]
        number = -codes[rank]
        if number in asked:
            print(f"megaqad: stopped by {signal.Signals(number).name} before the work began", file=sys.stderr)
            return EXIT_STOPPED_EARLY
        name = signal.Signals(number).name
        print(f"megaqad: rank {rank} was ended by {name}; all ranks were stopped", file=sys.stderr)
        return 128 + number
    if not notes:
        why = f"rank {first_seen} ended with code {codes[first_seen]} without a message"
        if len(asked) > 1:
            why = "stopped at once by a second signal; the last checkpoint is intact"
        print(f"megaqad: {why}", file=sys.stderr)
        return codes[first_seen]
    rank, earliest = min(notes.items(), key=lambda entry: entry[1].time)
    message = earliest.message
    print(f"rank {rank} failed first:\n{message}" if "\n" in message else message, file=sys.stderr)
    return earliest.code
