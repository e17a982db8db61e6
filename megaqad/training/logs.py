"""What a run leaves to read: ``metrics.jsonl`` always, wandb as asked, a progress bar for whoever is watching."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megaqad.config import Settings


class MetricsLog:
    """One JSON object per line in ``metrics.jsonl``, mirrored to wandb. Silent on all ranks but the main one."""

    def __init__(self, run_dir: Path, settings: Settings, *, is_main: bool, keep_steps: int = 0) -> None:
        """
        Args:
            keep_steps: rows up to this step stay (a resumed run goes on behind them), later ones are dropped.
        """
        self._file: TextIO | None = None
        self._wandb: Any = None
        if not is_main:
            return
        path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= keep_steps] if path.exists() else []
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.rename(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(run_dir, settings)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when this returns."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a crash is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _start_wandb(run_dir: Path, settings: Settings) -> Any:
    """A wandb run, or None when disabled. Its key comes from wandb's own login or environment, never from settings."""
    if settings.logging.wandb.mode == "disabled":
        return None
    import wandb

    return wandb.init(
        project=settings.logging.wandb.project,
        mode="online" if settings.logging.wandb.mode == "online" else "offline",
        dir=str(run_dir),
        name=run_dir.name,
        config=asdict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )


class Terminal:
    """What the person at the terminal sees; quiet on all ranks but the main one."""

    def __init__(self, *, is_main: bool) -> None:
        self.console = Console(quiet=not is_main, highlight=False)
        self._started = time.monotonic()

    def say(self, message: str) -> None:
        """One line, after the seconds since the command began."""
        self.console.print(f"[dim]{time.monotonic() - self._started:6.1f}s[/dim]  {message}", soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, *, done: int = 0) -> Iterator[Progress]:
        """A progress bar with one task, ``task_ids[0]``; where there is no terminal, one line when it is done."""
        columns = (
            TextColumn("        {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield progress
        if not self.console.is_terminal:
            self.say(f"{title}: {total} of {total}  {progress.tasks[task].fields['note']}".rstrip())
