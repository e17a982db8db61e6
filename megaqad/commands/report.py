"""``megaqad report``: the page and its numbers, from what the other commands left in ``output_dir``."""

import importlib.metadata
import json
import math
import platform
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

import megaqad
from megaqad.config import Settings
from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.encodings import Checkpoint
from megaqad.models.families import describe_model
from megaqad.quantization.allocation import BF16, GroupKL
from megaqad.quantization.choice import read_choice
from megaqad.report import (
    COLUMNS_FILE,
    Column,
    Curve,
    LayerError,
    RunFacts,
    RunResults,
    Verification,
    read_curve,
    recovery_table,
    write_report,
)

PACKAGES = ("torch", "megatron-core", "transformers", "nvidia-modelopt")


def report(settings: Settings) -> None:
    """Write the report again from the run's files; runs on one process."""
    show_report(settings)


def show_report(settings: Settings) -> None:
    """Write ``report/`` and print the table and where the page is."""
    results = collect(settings)
    write_report(results, settings.run_dir / "report")
    console = Console(highlight=False)
    console.print()
    console.print(recovery_table(results))
    console.print(f"\nreport: {settings.run_dir / 'report' / 'index.html'}", soft_wrap=True)
    console.print(f"checkpoint: {settings.run_dir / 'export'}", soft_wrap=True)


def collect(settings: Settings) -> RunResults:
    """Everything the page shows.

    Raises:
        UserError: the run has not been measured yet.
    """
    run_dir = settings.run_dir
    columns = _read(run_dir / COLUMNS_FILE)
    ptq = _read(run_dir / "ptq.json")
    found = {name: Column(**numbers) for name, numbers in columns["columns"].items()}
    return RunResults(
        bf16=found["bf16"],
        ptq=found["ptq"],
        qat=found.get("qat"),
        qad=found["qad"],
        qad_curve=_curve(run_dir / "metrics.jsonl"),
        qat_curve=_curve(run_dir / "qat" / "metrics.jsonl"),
        layer_errors=tuple(LayerError(**layer) for layer in ptq["layers"]),
        sensitivity=tuple(GroupKL(**group) for group in ptq.get("sensitivity", ())),
        facts=_facts(settings, columns["seconds"], columns["command"]),
    )


def _curve(path: Path) -> Curve:
    return read_curve(path) if path.is_file() else Curve()


def _facts(settings: Settings, seconds: float, command: list[str]) -> RunFacts:
    parallel, train = settings.parallel, settings.train
    architecture = describe_model(settings.model_dir)
    verified = settings.run_dir / "verify.json"
    verification = None
    if verified.is_file():
        found = _read(verified)
        verification = Verification(passed=found["passed"], summary=found["summary"])
    sizes = architecture.tensors.values()
    kept, in_fp8 = list(settings.quantization.exclude), list[str]()
    if settings.quantization.auto is not None:
        choice = read_choice(settings.run_dir)
        kept += choice.of(BF16)
        in_fp8 = choice.of("fp8")
    return RunFacts(
        model=settings.model_dir.absolute().name + _stored_as(settings, architecture),
        parameters=sum(map(math.prod, sizes)),
        data=settings.data.source if settings.data.source != "text" else ", ".join(settings.data.files),
        layout=f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
        + (f" x {parallel.virtual_pipeline} virtual" if parallel.virtual_pipeline > 1 else "")
        + f" x data {parallel.data}, {settings.runtime.dtype}",
        recipe=f"weights {settings.quantization.weights}, activations {settings.quantization.activations}, "
        + (f"FP8: {', '.join(in_fp8)}, " if in_fp8 else "")
        + f"BF16: {', '.join(kept) or 'nothing'}",
        steps=train.steps,
        tokens=train.steps * train.global_batch_size * train.sequence_length,
        seconds=seconds,
        command=shlex.join(command),
        versions={name: importlib.metadata.version(name) for name in PACKAGES}
        | {"megaqad": megaqad.__version__, "python": platform.python_version()},
        verification=verification,
    )


def _stored_as(settings: Settings, architecture: Architecture) -> str:
    """What number formats the model's own files hold, empty for an unquantized model."""
    kinds = Checkpoint(settings.model_dir).kinds(architecture.tensors)
    stored = ", ".join(
        f"{count} of {len(architecture.tensors)} tensors stored in {kind}" for kind, count in kinds.items()
    )
    return f" ({stored}, read as the BF16 values they stand for)" if stored else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `megaqad recover` with this output_dir first") from None
    assert isinstance(content, dict)
    return content
