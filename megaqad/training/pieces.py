"""The state of a run as pieces: which numbers of which global tensor this rank holds.

The description of the model says of every local tensor which boxes of which checkpoint tensors it is
(``models.weights``), under their Hugging Face names; so no layout shows in a key. The distributed optimizer divides
further: each data-parallel rank owns a run of the flattened local tensor. One description covers both::

    Piece = key of the global tensor, its shape, a box in it, and a run [start, stop) of that box, flattened

A checkpoint is a set of pieces that covers every tensor once (``store.py`` writes and reads them). Each rank writes
what it holds, nothing is gathered, and any layout can be filled from any other.

Optimizer state is described here rather than by the optimizer's own ``sharded_state_dict``: the form of it that
reshards gathers everything on the first data-parallel rank, three full copies in host memory, while training waits.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megaqad.models.model import Held, Model
from megaqad.models.weights import Copy, HfTensor, Weight
from megaqad.quantization.model import cache_sites, stored_scales, weight_sites
from megaqad.runtime.ranks import Ranks

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

    @classmethod
    def whole(cls, key: str, global_shape: tuple[int, ...], box: Box) -> "Piece":
        """All of a box."""
        return cls(key, global_shape, box, 0, box.numel)


@dataclass(frozen=True)
class LocalPiece:
    """A piece and the memory of this rank that holds it."""

    piece: Piece
    data: Tensor
    """A view of the live tensor, piece.numel elements, contiguous; reading it saves, writing it loads."""
    owned: bool
    """Whether this rank, among those that hold a copy, is the one that writes it."""


def _boxes(weight: Weight, local: Tensor, ranks: Ranks) -> Iterator[tuple[HfTensor, LocalPiece]]:
    """The parts of a weight as boxes of the checkpoint's tensors, ``owned`` by the first of the tensor-parallel ranks
    that have them. ``local``: this rank's tensor; what it adds in contiguous runs of rows is one box each."""
    rank, tensor = ranks.tensor_rank, ranks.sizes.tensor
    for part, view in zip(weight.parts, weight.join.views(local, tensor), strict=True):
        spans = part.box(rank, tensor)
        groups = list(view) if view.dim() > local.dim() else [view]  # a key/value group's heads lie together
        rows = (spans[0][1] - spans[0][0]) // len(groups) if spans else 1
        for index, group in enumerate(groups):
            shape = tuple(stop - start for start, stop in spans)
            offset = tuple(start for start, _ in spans)
            if spans:
                shape, offset = (rows, *shape[1:]), (offset[0] + index * rows, *offset[1:])
            box = Box(offset, shape)
            if box.numel:
                data = group.reshape(-1)[: box.numel]  # the vocabulary's padding left out
                assert data.data_ptr() == group.data_ptr(), f"{weight.name} does not lie in contiguous boxes"
                owned = part.cut.is_first(rank, tensor) and not weight.alias
                yield part, LocalPiece(Piece.whole(part.name, part.shape, box), data, owned)


def _is_first_copy(weight: Weight, ranks: Ranks) -> bool:
    """Whether this rank is the first of the data-parallel ranks that hold copies of a weight."""
    return (ranks.expert_data_group if weight.expert is not None else ranks.groups.dp_cp).rank() == 0


def model_pieces(model: Model) -> list[LocalPiece]:
    """Every parameter and every scale that is state, on this rank. No collectives."""
    pieces = []
    for held, local in _parameters(model):
        first = _is_first_copy(held.weight, model.ranks)
        pieces += [replace(piece, owned=piece.owned and first) for _, piece in _boxes(held.weight, local, model.ranks)]
    return pieces + list(_calibrated(model))


def _parameters(model: Model) -> Iterator[tuple[Held, Tensor]]:
    """The weights on this rank, and beside them the scales that are state, described as weights of their own."""
    for held in model.held:
        yield held, held.data
    ranks = (model.ranks.tensor_rank, model.ranks.sizes.tensor)
    for layer in stored_scales(model):
        (weight,) = layer.weights
        blocks = tuple(
            replace(
                part,
                name=f"{part.module}.weight_block_amax",
                shape=(part.shape[0], layer.weight_block_amax.shape[1] * part.shape[1] // layer.weight.shape[1]),
            )
            for part in weight.parts
        )
        scale = replace(weight, parts=blocks)
        yield Held(scale, layer.weight_block_amax, layer, ranks), layer.weight_block_amax.detach()
        one = replace(weight, parts=(HfTensor(f"{weight.parts[0].module}.weight_amax", (1,)),), join=Copy())
        yield Held(one, layer.weight_amax, layer, ranks), layer.weight_amax.detach()


def _calibrated(model: Model) -> Iterator[LocalPiece]:
    """What calibration found: a number for each module, the same on all ranks that hold a part of it."""
    ranks = model.ranks
    for layer in weight_sites(model):
        for weight, amax in zip(layer.weights, layer.input_amax.reshape(-1).split(1), strict=True):
            owned = ranks.tensor_rank == 0 and _is_first_copy(weight, ranks)
            yield LocalPiece(Piece.whole(f"{weight.modules[0]}.input_amax", (), Box((), ())), amax, owned)
    for site in cache_sites(model):
        owned = ranks.tensor_rank == 0 and ranks.groups.dp_cp.rank() == 0
        for name, amax in zip(site.names, (site.key_amax, site.value_amax), strict=True):
            yield LocalPiece(Piece.whole(f"{name}.output_amax", (), Box((), ())), amax.reshape(-1), owned)


def optimizer_pieces(optimizer: MegatronOptimizer, model: Model) -> list[LocalPiece]:
    """Moments and FP32 main parameters that this rank owns in the distributed optimizer. No collectives.

    The optimizer's state must exist (``allocate_state``). A main parameter that is the model's parameter itself (FP32
    runs) is left out.
    """
    boxes: dict[Tensor, list[LocalPiece]] = {}
    for held, local in _parameters(model):
        boxes.setdefault(held.parameter, []).extend(piece for _, piece in _boxes(held.weight, local, model.ranks))
    pieces: list[LocalPiece] = []
    for inner in distributed_optimizers(optimizer):
        for parameter, start, stop in _owned_runs(inner):
            group, order = inner.model_param_group_index_map[parameter]
            main = inner.optimizer.param_groups[group]["params"][order]
            states = {name: inner.optimizer.state[main][name] for name in MOMENTS}
            if main.dtype != parameter.dtype:
                states[MAIN_PARAMETER] = main
            for local_piece in boxes[parameter]:
                pieces += _run_in_box(local_piece, parameter, start, stop, states)
    return pieces


def _run_in_box(
    whole: LocalPiece, parameter: Tensor, start: int, stop: int, states: dict[str, Tensor]
) -> Iterator[LocalPiece]:
    """The part of a parameter's run [start, stop) that lies in one of its boxes. The runs of data-parallel ranks
    differ, so all of them are written."""
    first = whole.data.storage_offset() - parameter.storage_offset()
    low, high = max(start, first), min(stop, first + whole.data.numel())
    if low >= high:
        return
    for name, values in states.items():
        piece = replace(
            whole.piece, key=f"optimizer.{name}.{whole.piece.key}", start=int(low - first), stop=int(high - first)
        )
        yield LocalPiece(piece, values.detach().view(-1)[low - start : high - start], whole.owned)


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
                    inner.optimizer.state[parameter] = {"step": _count(0, group, parameter), **moments}
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
        for group in inner.optimizer.param_groups:
            if not isinstance(inner.optimizer, torch.optim.Adam):
                group["step"] = updates
                continue
            for parameter in group["params"]:
                state = inner.optimizer.state.get(parameter, {})
                if "step" in state:
                    # One tensor each: Adam adds 1 to every parameter's own, a shared one would run away.
                    state["step"] = _count(updates, group, parameter)


def _count(updates: int, group: Mapping[str, Any], parameter: Tensor) -> Tensor:
    """PyTorch's Adam counts on the host, its fused form where the parameter is."""
    device = parameter.device if group["fused"] else torch.device("cpu")
    return torch.full((), float(updates), dtype=torch.float32, device=device)
