"""A rank that makes no progress says where it is stuck, and ends.

When a collective hangs, because one rank waits elsewhere, a cable is dead or two ranks disagree about what comes next,
every rank stops making progress at about the same time. Each then prints the stacks of all its threads and the last
collectives that PyTorch's flight recorder holds, in one piece, and exits; the launcher ends what is left. The watchdog
counts from the last ``tick``, and is meant to fire before the process group's own timeout, which would show the stack
of the ranks that wait but not of the one that is missing.

It runs on a thread. Should the interpreter itself be stuck (a C call that never gives the lock back), faulthandler,
which needs no lock, prints the stacks ``LAST_RESORT_SECONDS`` later.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch

from megaqad.runtime.launch import write_note

LAST_RESORT_SECONDS = 10.0
FLIGHT_RECORDER_ENTRIES = 5
FLIGHT_RECORDER_SIZE = "2000"
EXIT_HANG = 1
SERVICE_THREADS = ("signals", "watchdog")
"""They wait by design."""


def enable_flight_recorder() -> None:
    """Let PyTorch keep the last collectives in memory; call before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_SIZE)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


class Watchdog:
    """Watches one rank while it is armed."""

    def __init__(self, seconds: float, rank: int) -> None:
        """
        Args:
            seconds: without a tick before the rank counts as hung.
        """
        self.seconds = seconds
        self.rank = rank
        self._last = time.monotonic()
        self._doing = ""
        self._armed = 0
        self._thread: threading.Thread | None = None

    def tick(self, doing: str | None = None) -> None:
        """Progress. ``doing``: what comes next, for the report."""
        self._last = time.monotonic()
        self._doing = doing or self._doing
        if self._armed:
            faulthandler.dump_traceback_later(self.seconds + LAST_RESORT_SECONDS, exit=True)

    @contextlib.contextmanager
    def armed(self, doing: str) -> Iterator[None]:
        """Expect ticks inside the block."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        self._armed += 1
        self.tick(doing)
        try:
            yield
        finally:
            self._armed -= 1
            if not self._armed:
                faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 10))
            silent = time.monotonic() - self._last
            if self._armed and silent > self.seconds:
                self._report()
                os._exit(EXIT_HANG)

    def _report(self) -> None:
        headline = f"rank {self.rank} has made no progress for {self.seconds:g} s ({self._doing})"
        os.write(sys.stderr.fileno(), f"\n{headline}; its threads:\n{stacks()}\n".encode())
        with contextlib.suppress(Exception):  # the recorder's format is PyTorch's affair, and the stacks are out
            os.write(sys.stderr.fileno(), last_collectives().encode())
        write_note(f"megaqad: {headline}; the stacks of all ranks stand above", EXIT_HANG)


def stacks() -> str:
    """The Python stacks of the threads of this process that work, the main thread's last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == threading.main_thread().ident)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames
        if names.get(ident) not in SERVICE_THREADS
    )


def last_collectives() -> str:
    """The newest entries of PyTorch's flight recorder; empty where it recorded none."""
    record = json.loads(torch._C._distributed_c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    rows = [
        f"  {entry['collective_seq_id']:>6} {entry['profiling_name']} {entry['input_sizes']} "
        f"in {entry['process_group'][-1]}: {'done' if entry['retired'] else entry['state']}"
        for entry in record.get("entries", [])[-FLIGHT_RECORDER_ENTRIES:]
    ]
    return "last collectives, newest at the end:\n" + "\n".join(rows) + "\n" if rows else ""
