"""A run small enough to be killed twenty times, and what must be equal however often it was."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forked import Command, CommandServer

STEPS = 8
SMALL = (
    "data=random",
    "data.max_train_tokens=20000",
    "data.max_validation_tokens=2000",
    "runtime.dtype=float32",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.sequence_length=32",
    "train.lr=1e-3",
    "train.warmup_steps=2",
    "quantization.calibration_samples=4",
    "checkpoint.every=2",
    "evaluation.max_tokens=256",
    "evaluation.training_tokens=128",
    "evaluation.every=4",
    "logging.wandb.mode=disabled",
)


@dataclass(frozen=True)
class Outcome:
    """What a finished run has left, without what may differ (times)."""

    final: dict[str, str]
    """sha256 of the last checkpoint's tensor files: weights, moments, random generators."""
    metrics: list[dict[str, Any]]
    """Rows of metrics.jsonl without their seconds."""


def outcome(run_dir: Path, steps: int = STEPS) -> Outcome:
    last = run_dir / "checkpoints" / f"step_{steps:08d}"
    final = {
        str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(last.rglob("*.safetensors"))
    }
    assert final, f"{last} holds no tensors"
    return Outcome(final, metrics(run_dir))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


_COMMANDS = itertools.count()


class Runner:
    """Starts commands on one model; every command gets a folder of its own for its output."""

    def __init__(self, server: CommandServer, folder: Path, model: Path, base: Sequence[str] = ()) -> None:
        self.server = server
        self.folder = folder
        self.model = model
        self.base = tuple(base)

    def start(
        self,
        run_dir: Path,
        *overrides: str,
        command: str = "distill",
        faults: Sequence[Sequence[Any]] = (),
        environment: dict[str, str] | None = None,
    ) -> Command:
        place = self.folder / "commands" / f"{next(_COMMANDS):04d}"
        arguments = self.arguments(run_dir, *overrides, command=command)
        return self.server.start(place, arguments, faults=faults, environment=environment)

    def arguments(self, run_dir: Path, *overrides: str, command: str = "distill") -> list[str]:
        """What stands behind ``megaqad``."""
        return [command, f"model={self.model}", f"output_dir={run_dir}", *SMALL, *self.base, *overrides]

    def finish(self, run_dir: Path, *overrides: str, **options: Any) -> str:
        """Run to the end, which must be good; what it printed."""
        command = self.start(run_dir, *overrides, **options)
        code = command.wait()
        assert code == 0, f"exit code {code}:\n{command.output}"
        return command.output


def wait_until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    """Look again and again until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    """Until a running command has made ``path``."""
    wait_until(path.exists)


def newest_step(run_dir: Path) -> int:
    """The step of the newest finished checkpoint; 0 without one."""
    steps = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")]
    return max(steps, default=0)
