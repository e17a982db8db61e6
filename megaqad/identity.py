"""Whose directory an ``output_dir`` is: ``run.json``, written when a run begins, compared when one resumes.

A directory belongs to one model, tokenizer, recipe, data and seed; training adds its own settings. A command that would
write into another run's directory is refused before it does any work, and the difference is named; ``resume.allow``
lists differences that are meant. How the run is divided among ranks, how often it logs and saves, when it stops and
what it evaluates are not part of its identity.

The same facts, with a digest of the training tokens themselves, stand in every checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaqad.config import Settings
from megaqad.data.tokens import tokenizer_fingerprint
from megaqad.distill_settings import TEACHERS
from megaqad.errors import UserError
from megaqad.runtime.files import write_text_whole
from megaqad.runtime.lock import DirectoryLock

FILE = "run.json"
NOT_IDENTITY_IN_TRAIN = ("micro_batch_size", "teacher_micro_batch_size", "recompute", "stop_after", "max_bad_steps")
TRAINING_COMMANDS = ("distill", "recover", "demo", "pretrain")
NOT_READ_WITH_A_STUDENT = ("quantization.calibration_samples", "quantization.backend")
"""Of a recipe: what may differ when a student is read. Backends compute one function, and only one runs anywhere."""
CONTENT_KEYS = {
    "model": "model",
    "student": "student",
    "tokenizer": "tokenizer",
    "data.tokens": "set of training tokens",
}
"""Facts that are digests: what differs is said in words."""
UNREAD = "unread"
"""In place of a digest that nobody has computed yet: it differs from nothing."""
WHOLE_FILE_BYTES = 64 * 1024 * 1024
"""Weight files up to this size are read whole for the fingerprint."""
SAMPLES, SAMPLE_BYTES = 128, 64 * 1024
"""Of larger files: blocks evenly spread, which every training step changes, and the header."""


def identity_of(command: str, settings: Settings, *, contents: bool = True) -> dict[str, Any]:
    """What may not change between commands in one directory, flat, by setting.

    Args:
        contents: read the models too, seconds for a large one; without, their digests are ``UNREAD``.
    """

    def model_digest(directory: Path) -> str:
        return model_fingerprint(directory) if contents else UNREAD

    parts: dict[str, Any] = {
        "model": model_digest(settings.model_dir),
        "tokenizer": tokenizer_digest(settings.model_dir),
        "data": asdict(settings.data),
        "quantization": asdict(settings.quantization),
        "seed": settings.seed,
        "runtime.dtype": settings.runtime.dtype,
    }
    if settings.start_dir != settings.model_dir:
        parts["student"] = model_digest(settings.start_dir)
    if command in TRAINING_COMMANDS:
        train = {key: value for key, value in asdict(settings.train).items() if key not in NOT_IDENTITY_IN_TRAIN}
        distill = asdict(settings.distill)
        del distill["cache"]  # where the teacher's numbers are kept, not what they are
        if distill["teacher"] == "cached":
            distill["teacher"] = "model"
        if settings.distill.teacher not in TEACHERS:
            distill["teacher"] = model_digest(settings.teacher_dir)
        parts |= {"train": train, "distill": distill, "kind": _kind(command)}
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _kind(command: str) -> str:
    return "pretraining" if command == "pretrain" else "distillation"


def tokenizer_digest(model_dir: Path) -> str:
    """64 hex digits of the tokenizer's files, or ``none``."""
    try:
        return tokenizer_fingerprint(model_dir)
    except UserError:
        return "none"  # random tokens need none; where text needs one, its absence is said there


def model_fingerprint(model_dir: Path) -> str:
    """sha256 of config.json and of the weights: all of a small file, header and spread samples of a large one.

    70B of weights are fingerprinted from about 250 MB of reading. Another model of the same shape differs in nearly
    every weight, so the samples tell it apart; a few changed bytes in a large file may go unseen.
    """
    digest = hashlib.sha256((model_dir / "config.json").read_bytes())
    for path in sorted(model_dir.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, WHOLE_FILE_BYTES)))
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_same_run(recorded: Mapping[str, Any], wanted: Mapping[str, Any], allow: Sequence[str], where: str) -> None:
    """Refuse to resume a run that is another one.

    Args:
        recorded: of the run that was started; what it does not know is not compared.
        wanted: of the command that would resume it.
        allow: ``resume.allow``: keys, or the part before the first dot.
        where: for the message.

    Raises:
        UserError: ``allow`` names nothing that could differ; or the first difference that it does not list.
    """
    groups = {key.split(".")[0] for key in wanted}
    unknown = [name for name in allow if name not in wanted and name not in groups]
    if unknown:
        known = ", ".join(sorted(groups))
        raise UserError(f"resume.allow names {unknown[0]}, which is no part of a run: it knows {known}")
    for key, value in wanted.items():
        if key not in recorded or value in (recorded[key], UNREAD) or key in allow or key.split(".")[0] in allow:
            continue
        difference = (
            f"another {CONTENT_KEYS[key]} (its content differs)"
            if key in CONTENT_KEYS
            else f"{key}={recorded[key]}, this one has {value}"
        )
        raise UserError(
            f"{where} belongs to a run with {difference}: give another output_dir, the same settings to resume "
            f"that run, or resume.allow=[{key}] if the change is meant"
        )


def check_output_dir(settings: Settings, identity: Mapping[str, Any]) -> None:
    """Refuse an ``output_dir`` that holds something else than the run of this identity.

    Raises:
        UserError: a file in its place, a non-empty directory that is no run, or a run with other settings; the first
            difference is named.
    """
    run_dir = settings.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"output_dir={run_dir} is a file: give a directory")
    if not run_dir.is_dir() or not any(not path.name.startswith(".") for path in run_dir.iterdir()):
        return
    recorded = _read(run_dir)
    if recorded is None:
        raise UserError(f"output_dir={run_dir} is not empty and holds no {FILE}: give a new or empty directory")
    check_same_run(recorded, identity, settings.resume.allow, f"output_dir={run_dir}")


def check_student(settings: Settings) -> None:
    """Refuse to read the run's student as something else than it is: another model or recipe computes other numbers.

    ``quantization=none`` reads the original model, whatever the run; ``student=<directory>`` leaves the run aside.

    Raises:
        UserError: the first difference.
    """
    recorded = _read(settings.run_dir) if settings.student in ("auto", "ptq") else None
    if recorded is None or settings.quantization.weights == "none":
        return
    wanted = {
        key: value
        for key, value in identity_of("evaluate", settings).items()
        if key in ("model", "tokenizer") or (key.startswith("quantization.") and key not in NOT_READ_WITH_A_STUDENT)
    }
    check_same_run(recorded, wanted, settings.resume.allow, f"output_dir={settings.run_dir}")


def claim_output_dir(command: str, settings: Settings, identity: Mapping[str, Any]) -> DirectoryLock:
    """Take the directory for this run and record it there; call on the main rank, before anything is written.

    Args:
        identity: with ``data.tokens``, a digest of the training tokens: text may have changed under its name.

    Returns:
        The lock, held until it is released or the process ends.

    Raises:
        UserError: as ``check_output_dir``; another run is at work there; it cannot be written.
    """
    run_dir = settings.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(run_dir, command)
        check_output_dir(settings, identity)
        record = {**(_read(run_dir) or {}), **identity}
        write_text_whole(run_dir / FILE, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir={run_dir} cannot be written ({error.strerror}): give another") from error
    return lock


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
