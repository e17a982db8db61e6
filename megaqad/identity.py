"""Whose directory an ``output_dir`` is: ``run.json``, written when a run begins, compared when one goes on.

A directory belongs to one model, recipe, data and seed; training adds its own settings. A command that would write
into another run's directory is refused before it does any work. How the run is divided among ranks, how often it
logs and what it evaluates are not part of its identity.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaqad.config import Settings
from megaqad.errors import UserError

FILE = "run.json"
NOT_IDENTITY_IN_TRAIN = ("micro_batch_size", "recompute")


def identity_of(command: str, settings: Settings) -> dict[str, Any]:
    """What may not change between commands in one directory, flat, by setting."""
    parts: dict[str, Any] = {
        "model": _model_fingerprint(settings.model_dir),
        "data": asdict(settings.data),
        "quantization": asdict(settings.quantization),
        "seed": settings.seed,
        "runtime.dtype": settings.runtime.dtype,
    }
    if command in ("distill", "recover", "demo", "pretrain"):
        train = {key: value for key, value in asdict(settings.train).items() if key not in NOT_IDENTITY_IN_TRAIN}
        parts |= {"train": train, "distill": asdict(settings.distill), "kind": _kind(command)}
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _kind(command: str) -> str:
    return "pretraining" if command == "pretrain" else "distillation"


def _model_fingerprint(model_dir: Path) -> str:
    """sha256 of config.json and of the names and sizes of the weight files: cheap, and different for another model."""
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def check_output_dir(command: str, settings: Settings) -> None:
    """Refuse an ``output_dir`` that holds something else than this run.

    Raises:
        UserError: a file in its place, a non-empty directory that is no run, or a run with other settings; the first
            difference is named.
    """
    run_dir = settings.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir={run_dir} is a file: give a directory")
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    recorded = _read(run_dir)
    if recorded is None:
        raise UserError(f"output_dir={run_dir} is not empty and holds no {FILE}: give a new or empty directory")
    for key, value in identity_of(command, settings).items():
        if key in recorded and recorded[key] != value:
            raise UserError(
                f"output_dir={run_dir} belongs to a run with {key}={recorded[key]}, this one has {value}: give another "
                "output_dir, or the same settings to go on with that run"
            )


def claim_output_dir(command: str, settings: Settings) -> None:
    """Record this run in its directory; call on the main rank after ``check_output_dir``."""
    run_dir = settings.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    record = (_read(run_dir) or {}) | identity_of(command, settings)
    temporary = run_dir / f".{FILE}.writing"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.rename(run_dir / FILE)


def _read(run_dir: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        raise UserError(f"{run_dir / FILE} is damaged: give another output_dir") from None
    if not isinstance(record, dict):
        raise UserError(f"{run_dir / FILE} is damaged: give another output_dir")
    return record
