"""Checkpoints through Megatron-Core's ``dist_checkpointing``: every rank writes its shards, any layout reads them.

One checkpoint is one directory, written under a temporary name, synced, and renamed when it is whole::

    checkpoints/step_00000100/
        weights/       model shards, input scales of the quantizers; with training, FP32 main parameters and moments
        state.json     step, samples consumed, learning-rate schedule, what the model and the recipe were

``latest`` names the newest. A key that is missing, extra or of another shape is an error.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaqad.errors import UserError
from megaqad.models.causal_lm import CausalLM
from megaqad.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows beside its tensors."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Training sequences used so far: the position in the data."""
    fingerprint: dict[str, str]
    """Model, recipe, data and seed the run was started with."""
    scheduler: dict[str, Any]
    """Learning-rate schedule."""


def step_directory(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lives."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None before the first."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    directory = run_dir / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
    if not (directory / "state.json").is_file():
        raise UserError(f"{pointer} names {directory.name}, which is incomplete: point it at another step_* directory")
    return directory


def read_state(directory: Path) -> CheckpointState:
    """``state.json`` of a checkpoint.

    Raises:
        UserError: the directory is no checkpoint.
    """
    path = directory / "state.json"
    try:
        return CheckpointState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint: it has no state.json") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): use another checkpoint") from error


def _sharded_state(
    chunks: Sequence[CausalLM], context: ParallelContext, optimizer: MegatronOptimizer | None, *, loading: bool
) -> dict[str, Any]:
    """The sharded tensors of this rank; layers are keyed by their global index, so any layout can read them."""
    metadata = {
        "dp_cp_group": context.groups.dp_cp,
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    state: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    return state


def save_checkpoint(
    directory: Path,
    chunks: Sequence[CausalLM],
    context: ParallelContext,
    state: CheckpointState,
    optimizer: MegatronOptimizer | None = None,
) -> None:
    """Write a whole checkpoint or none.

    Args:
        directory: its final name; must not exist.
        chunks: this rank's model, bare (not in DDP).
        optimizer: with its state too, to go on training from it.

    Collectives: those of ``dist_checkpointing.save`` and two barriers over all ranks.
    """
    temporary = directory.with_name(f".{directory.name}.writing")
    if context.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "weights").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(
        _sharded_state(chunks, context, optimizer, loading=False),
        str(temporary / "weights"),
        validate_access_integrity=True,
    )
    dist.barrier()
    if context.is_main:
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        _sync_tree(temporary)
        temporary.rename(directory)
        _sync(directory.parent)
    dist.barrier()


def load_checkpoint(
    directory: Path,
    chunks: Sequence[CausalLM],
    context: ParallelContext,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> CheckpointState:
    """Fill the model, and the optimizer and schedule if given, from a checkpoint of any layout.

    Raises:
        UserError: no checkpoint there, or its tensors are not exactly those of this model and recipe.
    """
    state = read_state(directory)
    sharded = _sharded_state(chunks, context, optimizer, loading=True)
    try:
        loaded = dist_checkpointing.load(
            sharded, str(directory / "weights"), strict=_strictness(with_optimizer=optimizer is not None)
        )
    except (dist_checkpointing.core.CheckpointingException, RuntimeError, KeyError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{directory} does not fit this model and recipe: {first_line}") from error
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state.scheduler)
    return state


def _strictness(*, with_optimizer: bool) -> StrictHandling:
    """Every key must match; without the optimizer its part of the checkpoint is left unread."""
    return StrictHandling.RAISE_ALL if with_optimizer else StrictHandling.RAISE_UNEXPECTED


def mark_latest(run_dir: Path, directory: Path, keep: int, context: ParallelContext) -> None:
    """Point ``latest`` at a finished checkpoint and remove all but the newest ``keep``. Main rank only works."""
    if not context.is_main:
        return
    folder = run_dir / "checkpoints"
    temporary = folder / ".latest.writing"
    temporary.write_text(directory.name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.rename(folder / "latest")
    _sync(folder)
    finished = sorted(path for path in folder.glob("step_*") if path.is_dir())
    for old in finished[:-keep]:
        if old != directory:
            shutil.rmtree(old)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
