"""Checkpoints: everything a run needs to resume with the very numbers it would have produced.

One checkpoint is one directory, written under a hidden name and renamed when it is whole::

    checkpoints/step_00000100/
        manifest.json      size and sha256 of every other file; written last
        state.json         position in schedule and data, fingerprints, settings, layout
        weights/rank_*     model pieces of each rank that writes: parameters, input scales of the quantizers
        training/rank_*    optimizer pieces and random number generators

``latest`` names the newest. Weights and training state are separate files because evaluation and export want only the
first. A key that is missing, extra or of another shape is an error, never a warning. ``pieces.py`` says what is saved,
``store.py`` how, ``saver.py`` when.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaqad.errors import UserError
from megaqad.models.model import Model
from megaqad.runtime.agree import device_of_group, raise_together, together
from megaqad.runtime.ranks import Ranks
from megaqad.training.manifest import DamagedCheckpoint, check_file, read_manifest
from megaqad.training.pieces import (
    Box,
    LocalPiece,
    Piece,
    allocate_state,
    model_pieces,
    optimizer_pieces,
    set_updates_done,
)
from megaqad.training.position import Position
from megaqad.training.rng import rng_state, set_rng_state
from megaqad.training.store import PieceReader

STATE_FILE = "state.json"
WEIGHTS = "weights"
TRAINING = "training"
RNG = "rng"
STEP_DIRECTORY = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows beside its tensors."""

    position: Position
    """Where the run is."""
    fingerprint: dict[str, str]
    """Model, tokenizer, data, recipe, schedule and seed that the run was started with."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Sizes of the parallel axes and the number of ranks: random generators go on only where they are the same."""
    updates: int = 0
    """Steps that the optimizer has really taken."""
    validation_kl: float | None = None
    """Held-out KL to the teacher, where it was measured at this step."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the command that wrote it, for people to read."""


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lives."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def finished_checkpoints(run_dir: Path) -> list[Path]:
    """Directories of a run that were renamed to their final name, the newest step last."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step_*") if path.is_dir() and STEP_DIRECTORY.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that ``latest`` names, None before the first."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not STEP_DIRECTORY.fullmatch(name):
        raise UserError(f"{pointer} names {name!r}, which is no checkpoint: write the name of a step_* directory in it")
    directory = run_dir / "checkpoints" / name
    if not (directory / STATE_FILE).is_file():
        raise UserError(f"{pointer} names {name}, which is incomplete: write the name of another checkpoint in it")
    return directory


def read_state(directory: Path) -> CheckpointState:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: the directory is no checkpoint.
    """
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return CheckpointState(**{**content, "position": Position.from_json(content["position"])})
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint: it has no {STATE_FILE}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): use another checkpoint") from error


def state_text(state: CheckpointState) -> str:
    """What ``read_state`` reads."""
    return json.dumps(asdict(state), indent=2, allow_nan=False) + "\n"


def layout_of(ranks: Ranks) -> dict[str, Any]:
    """The layout as a checkpoint records it."""
    return {**asdict(ranks.sizes), "ranks": ranks.world_size}


def local_rng_pieces(ranks: Ranks) -> list[LocalPiece]:
    """This rank's random generators, as pieces that belong to nobody else."""
    return [
        LocalPiece(
            Piece.whole(f"{RNG}.{ranks.rank}.{name}", tuple(state.shape), Box((0,), tuple(state.shape))),
            state,
            owned=True,
        )
        for name, state in rng_state().items()
    ]


def damage(directory: Path, ranks: Ranks, *, with_training: bool) -> str | None:
    """What is wrong with a checkpoint, None when every byte is as it was written; the same on every rank.

    Each rank reads its share of the files. Collective: those of ``raise_together``.
    """
    problem = None
    try:
        files = sorted(read_manifest(directory).items())
        wanted = [(name, digest) for name, digest in files if with_training or not name.startswith(f"{TRAINING}/")]
        for name, digest in wanted[ranks.rank :: ranks.world_size]:
            check_file(directory, name, digest)
    except DamagedCheckpoint as error:
        problem = str(error)
    try:
        raise_together(problem)
    except UserError as error:
        return str(error)
    return None


def load_checkpoint(
    directory: Path,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    *,
    checked: bool = False,
) -> CheckpointState:
    """Fill the model in place, and optimizer, schedule and random generators if given, from any layout's checkpoint.

    Args:
        model: bare, not in DDP.
        optimizer: with it the training state is read too.
        checked: ``damage`` has found nothing already.

    Collectives: a few small exchanges, so that all ranks succeed or fail together; those of ``Model.changed``.

    Raises:
        UserError: no checkpoint there, damaged, or its tensors are not exactly those of this model and recipe.
    """
    with_training = optimizer is not None
    with together():
        state = read_state(directory)
    found = None if checked else damage(directory, model.ranks, with_training=with_training)
    if found is not None:
        raise UserError(f"{directory} is damaged: {found}; use another checkpoint")
    wanted = model_pieces(model)
    if optimizer is not None:
        allocate_state(optimizer)
        wanted += optimizer_pieces(optimizer, model)
    with together():
        reader = _reader(directory, with_training=with_training)
        _fill(reader, wanted)
        _check_covered(model, wanted)
    _check_all_used(reader, wanted, directory)
    if optimizer is not None:
        set_updates_done(optimizer, state.updates)
        if state.layout == layout_of(model.ranks):
            with together():
                set_rng_state(_read_rng(reader, model.ranks))
    reader.close()
    model.changed()
    if scheduler is not None:
        scheduler.num_steps = 0
        scheduler.step(increment=state.position.step)
    return state


def _reader(directory: Path, *, with_training: bool) -> PieceReader:
    folders = (WEIGHTS, TRAINING) if with_training else (WEIGHTS,)
    names = [name for name in read_manifest(directory) if name.split("/")[0] in folders]
    reader = PieceReader(directory / name for name in names)
    incomplete = reader.incomplete()
    if incomplete:
        raise UserError(f"{directory} does not hold all of {incomplete[0]}: use another checkpoint")
    return reader


@torch.no_grad()
def _fill(reader: PieceReader, wanted: Sequence[LocalPiece]) -> None:
    for local in wanted:
        local.data.copy_(reader.read(local.piece))


def _check_covered(model: Model, wanted: Sequence[LocalPiece]) -> None:
    """Every tensor of the model's state dict must have been among the pieces that were filled."""
    filled = {local.data.data_ptr() for local in wanted}
    for chunk in model.chunks:
        for name, value in chunk.state_dict(keep_vars=True).items():
            covered = not isinstance(value, torch.Tensor) or value.numel() == 0 or value.data_ptr() in filled
            assert covered, f"{name} has no place in the checkpoint"


def _check_all_used(reader: PieceReader, wanted: Sequence[LocalPiece], directory: Path) -> None:
    """A tensor that is in the checkpoint and that no rank wants means another model or recipe."""
    mine = {local.piece.key for local in wanted}
    names = sorted(name for name in reader.names() if not name.startswith(f"{RNG}."))
    used = torch.tensor([int(name in mine) for name in names], device=device_of_group())
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    unused = [name for name, by_anyone in zip(names, used.tolist(), strict=True) if not by_anyone]
    if unused:
        raise UserError(
            f"{directory} holds {unused[0]}, which this model and recipe do not have: it belongs to another run"
        )


def _read_rng(reader: PieceReader, ranks: Ranks) -> dict[str, torch.Tensor]:
    prefix = f"{RNG}.{ranks.rank}."
    return {key.removeprefix(prefix): reader.read_whole(key) for key in reader.names() if key.startswith(prefix)}
