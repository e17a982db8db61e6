"""Being asked to stop: SIGTERM, SIGUSR1 or Ctrl-C, and what a second one means.

The first signal is a request. While training it is only noted, and the loop ends at its next step boundary with a
checkpoint; anywhere else there is nothing to save and ``StoppedEarly`` is raised at once. A second signal ends the
process on the spot, whatever it is doing, with the last good checkpoint on the disk.

Python runs signal handlers between bytecodes of the main thread, which may sit in a collective for minutes. So the
second signal is served by a thread of its own: the C handler writes the signal's number into a pipe at once, and the
thread reads it there. Process managers deliver one request twice (Slurm signals every process of a step, and torchrun
passes it on to its workers too): what arrives within ``ONE_REQUEST_SECONDS`` is one request.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from megaqad.errors import StoppedEarly

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_REQUEST_SECONDS = 1.0


@dataclass
class _Request:
    """What this process has been asked; one per process, as signals are."""

    number: int = 0
    since: float = 0.0
    deferred: bool = False
    raised: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, number: int) -> float:
        """Record a signal; seconds since the first one."""
        with self.lock:
            now = time.monotonic()
            if not self.number:
                self.number, self.since = number, now
            return now - self.since

    def raise_once(self) -> None:
        if self.number and not self.deferred and not self.raised:
            self.raised = True
            raise StoppedEarly(stop_reason())


_request = _Request()


def listen() -> None:
    """Serve the stop signals from now on. Call once, on the main thread, in the process that does the work."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def _on_signal(number: int, _frame: FrameType | None) -> None:
    """On the main thread, at its next bytecode."""
    _request.note(number)
    _request.raise_once()


def _watch(read_end: int) -> None:
    """On its own thread, at once: end the process on a second request."""
    while number := os.read(read_end, 1)[0]:
        if number in STOP_SIGNALS and _request.note(number) > ONE_REQUEST_SECONDS:
            os._exit(128 + number)


def stop_number() -> int:
    """The signal by which this process has been asked to stop, 0 when it has not."""
    return _request.number


def name_of(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name


def stop_reason() -> str:
    """The line to end with when a stop request found nothing to save."""
    return f"stopped by {name_of(_request.number)}: run the same command to go on"


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise the first stop request inside the block; after it signals do what they did before. For work of a process
    that does not ``listen``, because it starts others that do.

    Raises:
        StoppedEarly: a request came.
    """
    before = {number: signal.signal(number, _on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only note stop requests inside the block, which looks at ``stop_number`` itself; raise them at its end.

    Raises:
        StoppedEarly: a request came that the block did not serve.
    """
    _request.deferred = True
    try:
        yield
    finally:
        _request.deferred = False
    _request.raise_once()
