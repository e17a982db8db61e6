"""What a run leaves to read: ``metrics.jsonl`` always, wandb as asked, a progress bar on a terminal."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megaqad.config import Settings
from megaqad.errors import UserError
from megaqad.runtime.files import write_text_whole
from megaqad.runtime.watchdog import Watchdog

LINE_SECONDS = 10.0
"""Between lines of progress in a log, at least; and a hundred lines for a whole task at most."""
LINES = 100


class MetricsLog:
    """One JSON object per line in ``metrics.jsonl``, mirrored to wandb. Silent on all ranks but the main one."""

    def __init__(self, run_dir: Path, settings: Settings, *, is_main: bool, keep_steps: int = 0) -> None:
        """
        Args:
            keep_steps: rows up to this step stay (a resumed run continues after them), later ones are dropped.

        Raises:
            UserError: the file cannot be written.
        """
        self.problem: str | None = None
        """Why the last row could not be written; the loop tells all ranks."""
        self._path = run_dir / "metrics.jsonl"
        self._is_main = is_main
        self._file: TextIO | None = None
        self._wandb: Any = None
        self.rewind(keep_steps)
        if is_main:
            self._wandb = _start_wandb(run_dir, settings)

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``. Raises UserError when the file cannot be written."""
        if not self._is_main:
            return
        if self._file is not None:
            self._file.close()
        rows = {row["step"]: row for row in read_metrics(self._path) if row["step"] <= step}
        try:
            write_text_whole(self._path, "".join(json.dumps(rows[number]) + "\n" for number in sorted(rows)))
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error.strerror}): fix that and run again") from error

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when this returns, or ``problem`` says why not."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.problem = f"{self._path} cannot be written ({error.strerror}): make room and run again to go on"
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # said already
                self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; none without the file; a last line that was cut off by a crash is dropped."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _start_wandb(run_dir: Path, settings: Settings) -> Any:
    """A wandb run, or None when disabled. Its key comes from wandb's own login or environment, never from settings.

    A resumed run is one run there too: its id stands in the run's directory.
    """
    if settings.logging.wandb.mode == "disabled":
        return None
    import wandb

    id_file = run_dir / ".wandb_id"
    if not id_file.exists():
        write_text_whole(id_file, secrets.token_hex(4))
    return wandb.init(
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        project=settings.logging.wandb.project,
        mode="online" if settings.logging.wandb.mode == "online" else "offline",
        dir=str(run_dir),
        name=run_dir.name,
        config=asdict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )


class Terminal:
    """What the person at the terminal sees; quiet on all ranks but the main one.

    Whoever shows progress makes progress: with a ``watchdog``, every progress bar arms it and every advance feeds it.
    """

    def __init__(self, *, is_main: bool, watchdog: Watchdog | None = None) -> None:
        self.console = Console(quiet=not is_main, highlight=False)
        self._watchdog = watchdog
        self._started = time.monotonic()

    def say(self, message: str) -> None:
        """One line, after the seconds since the command began."""
        since = Text(f"{time.monotonic() - self._started:6.1f}s", style="dim")
        self.console.print(since + Text(f"  {message}"), soft_wrap=True)  # brackets in a message are no markup

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self._started

    @contextlib.contextmanager
    def progress(self, title: str, total: int, *, done: int = 0) -> Iterator[Progress]:
        """A progress bar with one task, ``task_ids[0]``; where there is no terminal, lines."""
        with self._bar(title, total, done) as progress:
            yield progress
        if not self.console.is_terminal:
            self.say(f"{title}: {total} of {total}  {progress.tasks[0].fields['note']}".rstrip())

    @contextlib.contextmanager
    def parts(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """A progress bar for work in several parts: tell it which part, steps done, steps in all."""

        def tell(part: str, done: int, total: int) -> None:
            progress.update(progress.task_ids[0], description=f"{title}, {part}", completed=done, total=total)

        with self._bar(title, 1, 0) as progress:
            yield tell

    @contextlib.contextmanager
    def _bar(self, title: str, total: int, done: int) -> Iterator[Progress]:
        columns = (
            TextColumn("        {task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        watched = self._watchdog.armed(title) if self._watchdog is not None else contextlib.nullcontext()
        shown = _WatchedProgress(*columns, console=self.console, disable=not self.console.is_terminal)
        shown.watchdog = self._watchdog
        shown.lines = None if self.console.is_terminal else _Lines(self.say)
        with watched, shown as progress:
            progress.add_task(title, total=total, completed=done, note="")
            yield progress


class _Lines:
    """Progress in a log, where no bar can be drawn: how far, what is left, and the task's note."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begun: tuple[str, float, float] | None = None
        self._said = (time.monotonic(), 0.0)

    def update(self, task: Task) -> None:
        """Say a line if one is due."""
        now, done, total = time.monotonic(), task.completed, task.total or 0
        if self._begun is None or self._begun[0] != task.description or done < self._said[1]:
            self._begun, self._said = (task.description, now, done), (now, done)
        before, done_before = self._said
        if now - before < LINE_SECONDS or done - done_before < total / LINES or done >= total:
            return
        _, begun, done_then = self._begun
        left = (now - begun) / (done - done_then) * (total - done)
        self._said = now, done
        note = f"  {task.fields['note']}" if task.fields["note"] else ""
        self._say(f"{task.description}: {done:.0f} of {total:.0f}{note}  {timedelta(seconds=round(left))} left")


class _WatchedProgress(Progress):
    """A progress bar whose updates feed the watchdog, or the log."""

    watchdog: Watchdog | None = None
    lines: _Lines | None = None

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        if self.lines is not None:
            self.lines.update(self.tasks[task_id])
        if self.watchdog is not None:
            task = self.tasks[task_id]
            self.watchdog.tick(f"{task.description}, {task.completed:.0f} of {task.total:.0f} done")
