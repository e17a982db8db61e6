"""Whole training runs inside the test ranks, by the same classes that the commands use."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from megaqad.config import check_settings, load_settings
from megaqad.distillation.step import DistillationStep, Objective
from megaqad.distillation.teachers import Teacher
from megaqad.errors import UserError
from megaqad.models.model import Model
from megaqad.recovery import distill, export
from megaqad.recovery.session import Session
from megaqad.recovery.students import ready_to_ship
from megaqad.runtime.ranks import shutdown_parallel
from megaqad.training.logs import read_metrics
from megaqad.training.optimizer import build_optimizer, wrap_for_training

SMALL_RUN = [
    "data=random",
    "data.max_train_tokens=257",  # one global batch, over and over, so that a few steps show learning
    "data.max_validation_tokens=2000",
    "runtime.dtype=float32",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "train.lr=3e-4",
    "quantization.calibration_samples=8",
    "evaluation.max_tokens=1024",
    "evaluation.training_tokens=256",
    "logging.wandb.mode=disabled",
]


def qad_step(session: Session, student: Model, teacher: Teacher, **options: Any) -> DistillationStep:
    """A step of QAD, alone. ``options``: further arguments of ``DistillationStep``."""
    wrapped = wrap_for_training(student)
    optimizer, scheduler = build_optimizer(wrapped, session.settings.train, session.dtype)
    return DistillationStep(student, wrapped, optimizer, scheduler, objective=Objective.QAD, teacher=teacher, **options)


def run_command(rank: int, world_size: int, name: str, overrides: list[str]) -> str | None:
    """One command on these ranks; its refusal, None when it ends well."""
    try:
        vars(importlib.import_module(f"megaqad.commands.{name}"))[name](load_settings(overrides))
    except UserError as error:
        return str(error)
    finally:
        shutdown_parallel()
    return None


def train_curve(rank: int, world_size: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Train as ``megaqad distill`` does; the rows of metrics.jsonl."""
    settings = load_settings([*SMALL_RUN, "checkpoint.every=1000", *overrides])
    settings_checked = check_settings("distill", settings)
    assert settings_checked.num_layers
    session = Session.start(settings, command="distill")
    try:
        distill(session)
        return read_metrics(settings.run_dir / "metrics.jsonl")
    finally:
        shutdown_parallel()


def export_digests(rank: int, world_size: int, overrides: list[str]) -> dict[str, str]:
    """Calibrate and export without training; sha256 of every exported file."""
    settings = load_settings([*SMALL_RUN, *overrides])
    session = Session.start(settings, command="quantize")
    try:
        export(session, ready_to_ship(session, session.calibrated_student()))
        files = sorted(Path(settings.run_dir / "export").iterdir())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    finally:
        shutdown_parallel()


def without_teacher(rank: int, world_size: int, overrides: list[str], train=train_curve):
    """Train; loading a whole frozen model would be a defect."""

    def never(*_):
        raise AssertionError("the teacher's layers were loaded")

    kept, Session.frozen = Session.frozen, never
    try:
        return train(rank, world_size, overrides)
    finally:
        Session.frozen = kept
