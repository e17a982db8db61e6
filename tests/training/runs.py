"""Training runs on the persistent test ranks, and what a checkpoint holds however it was cut."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad import recovery
from megaqad.config import check_settings, load_settings
from megaqad.errors import UserError
from megaqad.recovery.session import Session
from megaqad.runtime.ranks import shutdown_parallel
from megaqad.training.checkpoint import CheckpointState, latest_checkpoint, layout_of, load_checkpoint
from megaqad.training.optimizer import build_optimizer, wrap_for_training
from megaqad.training.pieces import updates_done
from megaqad.training.saver import CheckpointSaver
from megaqad.training.store import PieceReader


def distill(rank: int, world_size: int, overrides: list[str]) -> str | None:
    """``megaqad distill`` on these ranks; the message of its refusal, None when it ends well."""
    settings = load_settings(overrides)
    check_settings("distill", settings)
    session = None
    try:
        session = Session.start(settings, command="distill")
        recovery.distill(session)
    except UserError as error:
        return str(error)
    finally:
        if session is not None and session.lock is not None:
            session.lock.release()
        shutdown_parallel()
    return None


def copy_through_layout(rank: int, world_size: int, overrides: list[str], target: Path) -> None:
    """Load the newest checkpoint of a run into this layout and write it again to ``target``."""
    settings = load_settings(overrides)
    session = Session.start(settings)
    try:
        newest = latest_checkpoint(settings.run_dir)
        assert newest is not None
        student = session.original_student()
        optimizer, scheduler = build_optimizer(wrap_for_training(student), settings.train, session.dtype)
        state = load_checkpoint(newest, student, optimizer, scheduler)
        saver = CheckpointSaver(session.ranks)
        again = CheckpointState(
            state.position, state.fingerprint, layout_of(session.ranks), updates=updates_done(optimizer)
        )
        saver.start(target, student, again, optimizer)
        saver.finish()
    finally:
        shutdown_parallel()


def whole_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together from its pieces; random generators left out."""
    reader = PieceReader(sorted(directory.rglob("*.safetensors")))
    assert reader.incomplete() == []
    return {name: reader.read_whole(name) for name in sorted(reader.names()) if not name.startswith("rng.")}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit; a vocabulary's padding, which belongs to no token, is not compared."""
    assert one.keys() == other.keys()
    found = []
    for name, first in one.items():
        second = other[name]
        if first.shape != second.shape:
            rows = min(first.shape[0], second.shape[0])
            first, second = first[:rows], second[:rows]  # noqa: PLW2901
        if not torch.equal(first, second):
            found.append(name)
    return found


def losses(rows: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
