"""The state of a run as pieces: which numbers of which global tensor this rank holds.

Megatron-Core's ``sharded_state_dict`` says of every local tensor which box of a global tensor it is (a layer's key
holds its global number, so pipeline stages need no translation). The distributed optimizer divides further: each
data-parallel rank owns a run of the flattened local tensor. One description covers both::

    Piece = key of the global tensor, its shape, a box in it, and a run [start, stop) of that box, flattened

A checkpoint is a set of pieces that covers every tensor once (``store.py`` writes and reads them). Each rank writes
what it holds, nothing is gathered, and any layout can be filled from any other.

Optimizer state is described here rather than by the optimizer's own ``sharded_state_dict``: the form of it that
reshards gathers everything on the first data-parallel rank, three full copies in host memory, while training waits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megaqad.models.causal_lm import CausalLM
from megaqad.runtime.parallel import ParallelContext

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN_PARAMETER = "main"


@dataclass(frozen=True)
class Box:
    """A part of a global tensor: [offset, offset + shape) along every dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A run of a flattened box of a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LocalPiece:
    """A piece and the memory of this rank that holds it."""

    piece: Piece
    data: Tensor
    """A view of the live tensor, piece.numel elements, contiguous; reading it saves, writing it loads."""
    owned: bool
    """Whether this rank, among those that hold a copy, is the one that writes it."""
    padded: bool
    """The global shape may differ between layouts (the vocabulary's padding); what the checkpoint lacks is zero."""


def _box(shard: ShardedTensor) -> Box:
    prepended = (1,) * shard.prepend_axis_num
    return Box(tuple(shard.global_offset), (*prepended, *shard.local_shape))


def _shards(entry: Any) -> list[ShardedTensor]:
    """The boxes of one entry of a sharded state dict: one, or several where a factory splits a fused tensor.

    Transformer Engine's ``_extra_state`` objects are left out: they are pickles, and the quantizers' state of this
    project lives in ordinary tensors.
    """
    if isinstance(entry, ShardedObject):
        return []
    if isinstance(entry, ShardedTensorFactory):
        return [shard for shard in nested_values({"built": entry.build()}) if isinstance(shard, ShardedTensor)]
    assert isinstance(entry, ShardedTensor), f"{entry} is no sharded tensor"
    return [entry]


def _entries(chunks: Sequence[CausalLM], context: ParallelContext) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    metadata = {"dp_cp_group": context.groups.dp_cp, "non_homogeneous_layers": True}
    for chunk in chunks:
        yield from nested_values(chunk.sharded_state_dict(metadata=metadata))


def _is_first(replica: Any) -> bool:
    return replica == 0 if isinstance(replica, int) else not any(replica)


def model_pieces(chunks: Sequence[CausalLM], context: ParallelContext) -> list[LocalPiece]:
    """Every parameter and persistent buffer of this rank's chunks. No collectives."""
    pieces = []
    for entry in _entries(chunks, context):
        for shard in _shards(entry):
            box = _box(shard)
            assert shard.data.is_contiguous(), f"{shard.key} is not contiguous"
            pieces.append(
                LocalPiece(
                    Piece(shard.key, tuple(shard.global_shape), box, 0, box.numel),
                    shard.data.detach().reshape(-1),
                    owned=_is_first(shard.replica_id),
                    padded=shard.allow_shape_mismatch,
                )
            )
    return pieces


def optimizer_pieces(
    optimizer: MegatronOptimizer, chunks: Sequence[CausalLM], context: ParallelContext
) -> list[LocalPiece]:
    """Moments and FP32 main parameters that this rank owns in the distributed optimizer. No collectives.

    The optimizer's state must exist (``allocate_state``). A main parameter that is the model's parameter itself (FP32
    runs) is left out.
    """
    shards_of = {entry.data: _shards(entry) for entry in _entries(chunks, context) if entry.data is not None}
    pieces: list[LocalPiece] = []
    for inner in distributed_optimizers(optimizer):
        for parameter, start, stop in _owned_runs(inner):
            group, order = inner.model_param_group_index_map[parameter]
            main = inner.optimizer.param_groups[group]["params"][order]
            states = {name: inner.optimizer.state[main][name] for name in MOMENTS}
            if main.dtype != parameter.dtype:
                states[MAIN_PARAMETER] = main
            for shard in shards_of[parameter]:
                pieces += _run_in_shard(shard, parameter, start, stop, states)
    return pieces


def _run_in_shard(
    shard: ShardedTensor, parameter: Tensor, start: int, stop: int, states: Mapping[str, Tensor]
) -> Iterator[LocalPiece]:
    """The part of a parameter's run [start, stop) that lies in one of its boxes."""
    assert shard.data.is_contiguous(), f"{shard.key} is not contiguous"
    first = shard.data.storage_offset() - parameter.storage_offset()
    low, high = max(start, first), min(stop, first + shard.data.numel())
    if low >= high:
        return
    # Replicas are (pipeline, tensor, data): the runs of the data-parallel ranks differ, so all of them are written.
    owned = _is_first(tuple(shard.replica_id)[:-1])
    for name, values in states.items():
        yield LocalPiece(
            Piece(f"optimizer.{name}.{shard.key}", tuple(shard.global_shape), _box(shard), low - first, high - first),
            values.detach().view(-1)[low - start : high - start],
            owned=owned,
            padded=shard.allow_shape_mismatch,
        )


def _owned_runs(inner: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """(model parameter, start, stop): the run of each flattened parameter that this data-parallel rank updates."""
    for buffer_ranges in inner.gbuf_ranges:
        for bucket_ranges in buffer_ranges.values():
            for bucket in bucket_ranges:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside Megatron-Core's chain (one, or one more for experts)."""
    inner = list(optimizer.chained_optimizers)
    assert all(isinstance(one, DistributedOptimizer) for one in inner), "the distributed optimizer is always used"
    return inner


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that has not stepped yet its moments, all zero: they exist from its first step on only."""
    for inner in distributed_optimizers(optimizer):
        if inner.optimizer.state:
            continue
        if isinstance(inner.optimizer, torch.optim.Adam):  # AdamW is one
            for group in inner.optimizer.param_groups:
                for parameter in group["params"]:
                    moments = {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}
                    inner.optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        else:  # Transformer Engine's and Apex's FusedAdam know themselves how
            inner._init_optimizer_states_with_dummy_values()


def updates_done(optimizer: MegatronOptimizer) -> int:
    """Steps the optimizer has really taken, which its bias correction counts."""
    counts = set()
    for inner in distributed_optimizers(optimizer):
        counts |= {int(state["step"]) for state in inner.optimizer.state.values() if "step" in state}
        counts |= {int(group["step"]) for group in inner.optimizer.param_groups if group["params"] and "step" in group}
    assert len(counts) <= 1, f"parameters have taken different numbers of steps: {counts}"
    return counts.pop() if counts else 0


def set_updates_done(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the count that ``updates_done`` reads: kept per parameter by PyTorch's Adam, per group by FusedAdam."""
    for inner in distributed_optimizers(optimizer):
        for state in inner.optimizer.state.values():
            if "step" in state:
                # One tensor each: Adam adds 1 to every parameter's own, a shared one would run away.
                state["step"] = torch.full((), float(updates), dtype=torch.float32)
        if not isinstance(inner.optimizer, torch.optim.Adam):
            for group in inner.optimizer.param_groups:
                group["step"] = updates
