"""One case from checkpoint to export, and the record of it.

Only the command line and the files it leaves are used, with nothing of megaqad's modules, so that they may be taken
apart and the numbers still compared. Commands are forked from a process that has imported everything
(``tests/forked.py``): a hundred starts of one second each, not of fifteen.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from tests.forked import REPOSITORY, CommandServer
from tests.golden.cases import DTYPES, Case
from tests.models.checkpoints import CASES as MODELS
from tests.models.checkpoints import make_checkpoint, random_tokens
from tests.overrides import merged

STEPS = 20
SHARD_SIZES = {"mistral": "100KB"}
"""Of models whose checkpoint is in several files."""
SETTINGS = (
    "data=random",
    "data.max_train_tokens=20000",
    "data.max_validation_tokens=2000",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.sequence_length=48",
    "train.lr=1e-3",
    "train.warmup_steps=2",
    "quantization.calibration_samples=6",
    f"checkpoint.every={STEPS // 2}",
    f"evaluation.every={STEPS // 2}",
    "evaluation.max_tokens=384",
    "evaluation.training_tokens=192",
    "report.sensitivity=false",
    "logging.wandb.mode=disabled",
)
DIGITS = 12
"""Hexadecimal digits kept of a SHA-256: 48 bits, because nobody forges here."""

PORT_TAKEN = "EADDRINUSE"
MOST_STARTS = 3
MOST_LINES = 15
"""Of a failed command's output that are shown: the end."""

Record = dict[str, Any]
Start = Callable[[list[str]], None]
"""Runs ``megaqad <arguments>`` to its end, which must be good."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    case: Case
    record: Record
    """Without the parts that come after a failure."""
    failure: str | None
    seconds: float


class Commands:
    """Starts commands on one thread, so that sums have one order."""

    def __init__(self, folder: Path, *, forked: bool = True) -> None:
        """``forked``: from a server that has imported everything; else each is a new Python, as users start it."""
        self._folder = folder
        self._server = CommandServer() if forked else None
        self._started = 0

    def run(self, arguments: list[str]) -> None:
        """Run ``megaqad <arguments>`` to its end.

        Started again where another command of this moment was given the same free port: it has done nothing yet.

        Raises:
            RuntimeError: it failed.
        """
        for _ in range(MOST_STARTS):
            code, output = self._run_once(arguments)
            if code == 0 or PORT_TAKEN not in output:
                break
        if code:
            end = "\n".join(output.splitlines()[-MOST_LINES:])
            raise RuntimeError(f"exit code {code} of megaqad {' '.join(arguments)}\n{end}")

    def _run_once(self, arguments: list[str]) -> tuple[int, str]:
        """Its exit code and what it printed."""
        self._started += 1
        if self._server is not None:
            command = self._server.start(self._folder / f"{self._started:05d}", arguments)
            return command.wait(), command.output
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        plain = [sys.executable, "-m", "megaqad", *merged(arguments)]
        done = subprocess.run(plain, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def record_cases(
    cases: Sequence[Case], folder: Path, *, jobs: int = 1, forked: bool = True, last: str = "verify"
) -> Iterator[Outcome]:
    """Run the cases in ``folder``, ``jobs`` at a time, and yield each as it ends.

    A case that fails is yielded with what it got to, and the others run on.

    Args:
        last: the part of the records after which nothing more is run.
    """
    models = {(case.model, case.dtype): _make_model(case, folder / "models") for case in cases}
    servers = [Commands(folder / f"commands_{number}", forked=forked) for number in range(min(jobs, len(cases)))]
    free: SimpleQueue[Commands] = SimpleQueue()
    for server in servers:
        free.put(server)

    def run(case: Case) -> Outcome:
        commands, started = free.get(), time.monotonic()
        record: Record = {}
        failure = None
        try:
            for part, content in _parts(case, models[case.model, case.dtype], folder / case.name, commands.run):
                record[part] = content
                if part == last:
                    break
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            failure = str(error)
        finally:
            free.put(commands)
        return Outcome(case, record, failure, time.monotonic() - started)

    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            for future in as_completed([pool.submit(run, case) for case in cases]):
                yield future.result()
    finally:
        for server in servers:
            server.close()


def _make_model(case: Case, folder: Path) -> Path:
    """The case's checkpoint, the same bytes each time; drawn from torch's generator, so in one thread."""
    model = folder / f"{case.model}_{case.dtype}"
    if not model.exists():
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[DTYPES[case.dtype]]
        make_checkpoint(case.model, model, dtype=dtype, shard_size=SHARD_SIZES.get(case.model, "5GB"))
    return model


def _parts(case: Case, model: Path, folder: Path, start: Start) -> Iterator[tuple[str, Any]]:
    """Run the case's commands in ``folder``, which is new, and yield what they leave, by the name of the part."""
    folder.mkdir()
    run_dir, tokens = folder / "run", folder / "tokens.npy"
    np.save(tokens, random_tokens(MODELS[case.model]["vocab_size"], batch=2))

    def command(name: str, *overrides: str, layout: str | None = None) -> None:
        start([name, f"model={model}", f"output_dir={run_dir}", *SETTINGS, *case.overrides(layout), *overrides])

    yield "checkpoint", _files(model)
    command("quantize")
    yield "ptq", _json(run_dir / "ptq.json")
    command("export", "student=ptq")
    yield "ptq_export", _export(run_dir / "export")
    command("distill")
    yield "training", _training(run_dir / "metrics.jsonl")
    layout, last = case.resumed_in, run_dir / "checkpoints" / f"step_{STEPS:08d}"
    if layout is not None:
        shutil.rmtree(last)
        command("distill", layout=layout)
        yield "resumed", _training(run_dir / "metrics.jsonl")
    trained = f"student={last if case.recipe == 'none' else 'auto'}"  # without quantizers ``auto`` is the teacher
    command("evaluate", trained, layout=layout)
    yield "evaluation", _json(run_dir / "evaluation.json")
    command("export", trained, layout=layout)
    yield "export", _export(run_dir / "export")
    command("logits", trained, f"tokens={tokens}", layout=layout)
    yield "logits", _digest(run_dir / "logits.npy")
    command("verify", trained, f"tokens={tokens}", layout=layout)
    yield "verify", {key: value for key, value in _json(run_dir / "verify.json").items() if key in VERIFIED}


VERIFIED = (
    "passed",
    "tensors",
    "quantized_modules",
    "weight_only",
    "tokens",
    "relative_error",
    "kl_to_student",
    "top1_agreement",
    "weights_relative_error",
    "activation_effect",
)
"""Of verify.json: results, not which readers were installed."""


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]


def _files(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's files."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir())}


def _export(folder: Path) -> dict[str, dict[str, str]]:
    """Digests of an export's small files and of each tensor, by module and ending."""
    manifest = _json(folder / "megaqad_manifest.json")
    found: dict[str, dict[str, str]] = {"files": {name: digest[:DIGITS] for name, digest in manifest["files"].items()}}
    for name, digest in manifest["tensors"].items():
        module, _, ending = name.rpartition(".")
        found.setdefault(module, {})[ending] = digest[:DIGITS]
    return found


def _training(path: Path) -> dict[str, list[float]]:
    """Losses, gradient norms and held-out numbers, in the order of steps."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    validations = [row["validation"] for row in rows if "validation" in row]
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        **{f"validation_{name}": [numbers[name] for numbers in validations] for name in validations[0]},
    }
