"""Where the tensors of a Hugging Face checkpoint lie in a model that is divided among ranks.

A ``Weight`` reads: *this parameter is made of these checkpoint tensors, joined so*; each of its parts says how the
tensor-parallel ranks divide it. Reading, writing, checkpoints, quantization and its recipe all follow this one
description, so a block describes its parameters once.

Cutting comes before joining: a rank's parameter is the join of its cuts. That holds because query, key and value heads
are interleaved by attention group and a rank's gate rows stand before its up rows. It is what lets every rank read,
quantize and write its own part without seeing the others'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How the tensor-parallel ranks divide a tensor along one dim."""

    dim: int | None
    """The dim that is cut; None: every rank holds all of it."""
    units: int | None = None
    """The dim consists of so many equal units (heads) that stay whole; with fewer units than ranks, neighbouring ranks
    hold the same one."""
    padded: bool = False
    """Equal parts after padding to a multiple of the ranks (the vocabulary): the last ranks hold fewer, or none."""
    least: int = 0
    """Of ``padded``: cut as a dim of at least so many would be."""

    def span(self, size: int, rank: int, ranks: int) -> tuple[int, int]:
        """First and one-past-last index that ``rank`` holds of the cut dim of ``size``, padding left out."""
        if self.padded:
            rows = self.part(size, ranks)
            start = min(rank * rows, size)
            return start, min(start + rows, size)
        parts = ranks if self.units is None else min(self.units, ranks)
        assert size % parts == 0, f"{size} does not divide by {parts}"
        part = rank * parts // ranks
        return part * (size // parts), (part + 1) * (size // parts)

    def part(self, size: int, ranks: int) -> int:
        """Of ``padded``: what every rank holds of a dim of ``size``, padding included."""
        return -(-max(size, self.least) // ranks)

    def is_first(self, rank: int, ranks: int) -> bool:
        """Whether ``rank`` is the first of those that hold its part."""
        if self.dim is None:
            return rank == 0
        return self.units is None or self.units >= ranks or rank * self.units % ranks == 0


WHOLE = Cut(None)
COLUMN = Cut(0)
"""Outputs are divided."""
ROW = Cut(1)
"""Inputs are divided."""
VOCABULARY = Cut(0, padded=True)


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the checkpoint, or some rows of one, and how it is cut."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor in the checkpoint."""
    cut: Cut = WHOLE
    """Of ``rows``."""
    rows: tuple[int, int] | None = None
    """First and one-past-last row (dim 0) that is meant; None: all. For tensors in which the file fuses several."""

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def first_row(self) -> int:
        return 0 if self.rows is None else self.rows[0]

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of what is meant."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])

    def box(self, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
        """Per dim the (start, stop) in the checkpoint's tensor of what ``rank`` holds."""
        spans = [(0, size) for size in self.size]
        if self.cut.dim is not None:
            spans[self.cut.dim] = self.cut.span(self.size[self.cut.dim], rank, ranks)
        if spans:
            spans[0] = (spans[0][0] + self.first_row, spans[0][1] + self.first_row)
        return tuple(spans)


class Join(Protocol):
    """How the parts lie in a parameter."""

    def views(self, parameter: Tensor, ranks: int) -> list[Tensor]:
        """The parts of this rank's ``parameter`` as views of it, in the order of ``Weight.parts``; a view's leading
        dims flatten to the rows of the part. Also of a tensor that only shares the parameter's rows (block scales)."""
        ...


@dataclass(frozen=True)
class Copy:
    """One part, as it is."""

    def views(self, parameter: Tensor, ranks: int) -> list[Tensor]:
        return [parameter]


@dataclass(frozen=True)
class GateUp:
    """All gate rows, then all up rows."""

    def views(self, parameter: Tensor, ranks: int) -> list[Tensor]:
        return list(parameter.chunk(2))


@dataclass(frozen=True)
class Heads:
    """Per key/value group: its query heads, its key head, its value head."""

    heads: int
    groups: int
    head_dim: int

    def views(self, parameter: Tensor, ranks: int) -> list[Tensor]:
        queries = self.heads // max(self.groups, ranks)  # of one group, on one rank
        grouped = parameter.view(-1, queries + 2, self.head_dim, *parameter.shape[1:])  # [g, queries + 2, d, ..]
        return [grouped[:, :queries], grouped[:, queries : queries + 1], grouped[:, queries + 1 :]]


@dataclass(frozen=True)
class Weight:
    """One parameter of the model, or one expert's slice of a parameter that stacks several."""

    name: str
    """Of the parameter, within its layer, or within the chunk before and after the layers."""
    parts: tuple[HfTensor, ...]
    join: Join = Copy()
    linear: bool = False
    """Whether it is the weight of a linear layer, which a recipe may quantize."""
    expert: int | None = None
    """Which expert's it is; the expert-parallel ranks divide ``experts`` in equal runs. None: no expert's."""
    experts: int = 1
    """How many the parameter stacks, over all ranks."""
    layer: int | None = None
    """Index of its layer in the model; None before and after the layers."""
    alias: bool = False
    """A second copy of tensors that another weight owns (a tied head): filled on import, not written on export."""
    after_layers: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the checkpoint's modules that it holds, in order; engines multiply them as one."""
        return tuple(dict.fromkeys(part.module for part in self.parts))

    @property
    def row_parallel(self) -> bool:
        """Whether the ranks divide the inputs of this linear layer."""
        return self.parts[0].cut.dim == 1

    @property
    def numel(self) -> int:
        """Elements of the whole weight."""
        return sum(prod(part.size) for part in self.parts)

    def inputs(self, ranks: int) -> int:
        """How many inputs one of ``ranks`` multiplies, along which blocks of a number format lie."""
        return self.parts[0].size[1] // (ranks if self.row_parallel else 1)

    def fill(self, local: Tensor, shards: Sequence[Tensor], ranks: int) -> None:
        """Write a rank's shards of the parts into its ``local`` tensor; padded vocabulary rows become zero."""
        for part, view, shard in zip(self.parts, self.join.views(local, ranks), shards, strict=True):
            if part.cut.padded:
                view[: shard.shape[0]].copy_(shard)
                view[shard.shape[0] :].zero_()
            else:
                view.copy_(shard.reshape(view.shape))

    def take(self, local: Tensor, rank: int, ranks: int) -> list[Tensor]:
        """The rank's shards of the parts, [rows, ..] each, padding left out; views where memory allows it.

        ``local`` may also be a tensor that only shares the rows of the weight, like its block scales.
        """
        shards = []
        for part, view in zip(self.parts, self.join.views(local, ranks), strict=True):
            shard = view.flatten(0, view.dim() - local.dim()) if view.dim() > local.dim() else view
            if part.cut.padded:
                start, stop = part.cut.span(part.size[0], rank, ranks)
                shard = shard[: stop - start]
            shards.append(shard)
        return shards
