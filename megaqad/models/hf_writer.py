"""Take a sharded model apart into Hugging Face tensors, one at a time, on one rank.

Every tensor takes the same way: the tensor-parallel ranks of the stage that holds it convert their shards (a cast to
BF16 here, quantization in ``export``), the group's first rank gathers the parts, and hands the whole to the first
stage, whose first rank yields it. One writer means that the files do not depend on the layout: any tensor x pipeline
division gives the same bytes. Memory on any rank: one whole tensor, converted.

What travels is bytes, viewed as uint8: process groups then need not know float8 or packed codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.build import chunk_layers
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.rows import PlacedRow, placed_rows
from megaqad.models.sharding import local_parameters, take_parts
from megaqad.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint to be written."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    dim: int | None
    """The dim that the tensor-parallel ranks divide in equal parts, the last ones possibly shorter; None when every
    rank has the whole."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def padded_shard(self, ranks: int) -> tuple[int, ...]:
        """Shape of a rank's share, the shorter ones padded to the longest."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], -(-self.shape[self.dim] // ranks), *self.shape[self.dim + 1 :])


class Conversion(Protocol):
    """What becomes of the Hugging Face shards of one Megatron parameter."""

    def pieces(self, placed: PlacedRow) -> list[Piece]:
        """The tensors that ``convert`` gives, by name, whole shape and dtype; known on every rank."""
        ...

    def convert(self, placed: PlacedRow, shards: list[Tensor]) -> list[Tensor]:
        """This rank's share of each piece, from its shards of ``placed.parts``. Collectives over the tensor-parallel
        group are allowed: all its ranks call this in the same order."""
        ...


@dataclass(frozen=True)
class Cast:
    """Keep every tensor, in one dtype."""

    description: ModelDescription
    dtype: torch.dtype

    def pieces(self, placed: PlacedRow) -> list[Piece]:
        dims = self.description.dims
        return [Piece(part.name, part.sizes(dims), self.dtype, placed.row.shard.dim) for part in placed.parts]

    def convert(self, placed: PlacedRow, shards: list[Tensor]) -> list[Tensor]:
        return [shard.to(self.dtype) for shard in shards]


def written_rows(description: ModelDescription) -> list[PlacedRow]:
    """The rows that a checkpoint stores, in its order."""
    return [placed for placed in placed_rows(description) if not placed.row.alias]


@torch.no_grad()
def stream_pieces(
    chunks: list[CausalLM], description: ModelDescription, context: ParallelContext, conversion: Conversion
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) in checkpoint order, on the main rank; nothing on the others.

    Every rank must run the iterator to its end. Collectives: per tensor one gather over the tensor-parallel group of
    the stage that holds it and one send to the first stage; only data-parallel replica 0 takes part.
    """
    if context.groups.dp_cp.rank() != 0:
        return
    held = {placed: parameter for chunk in chunks for placed, parameter in local_parameters(chunk, description)}
    stages = _layer_stages(chunks[0], context)
    for placed in written_rows(description):
        if placed.layer is not None:
            stage = stages[placed.layer]
        else:
            stage = context.sizes.pipeline - 1 if placed.after_layers else 0
        pieces = conversion.pieces(placed)
        shards: list[Tensor] | None = None
        if stage == context.pipeline_rank:
            parts = take_parts(
                placed.row, held[placed].detach(), description, context.tensor_rank, context.sizes.tensor
            )
            shards = conversion.convert(placed, parts)
        for index, piece in enumerate(pieces):
            whole = _gather(piece, shards[index], context) if shards is not None else None
            whole = _hand_over(piece, whole, stage, context)
            if whole is not None:
                yield piece.name, whole.cpu()


def _layer_stages(chunk: CausalLM, context: ParallelContext) -> dict[int, int]:
    """Pipeline stage by global layer index."""
    virtual = context.sizes.virtual_pipeline
    return {
        layer: stage
        for stage in range(context.sizes.pipeline)
        for vp_stage in (range(virtual) if virtual > 1 else (None,))
        for layer in chunk_layers(chunk.config, stage, vp_stage)
    }


def _gather(piece: Piece, shard: Tensor, context: ParallelContext) -> Tensor | None:
    """The whole piece on tensor-parallel rank 0, None on the others."""
    assert shard.dtype is piece.dtype, f"{piece.name}: {shard.dtype} instead of {piece.dtype}"
    ranks = context.sizes.tensor
    if piece.dim is None or ranks == 1:
        return shard if context.tensor_rank == 0 else None
    padded = torch.zeros(piece.padded_shard(ranks), dtype=piece.dtype, device=shard.device)
    padded.narrow(piece.dim, 0, shard.shape[piece.dim]).copy_(shard)
    parts = [torch.empty_like(padded) for _ in range(ranks)] if context.tensor_rank == 0 else None
    dist.gather(
        _bytes(padded),
        [_bytes(part) for part in parts] if parts is not None else None,
        group=context.tensor_group,
        group_dst=0,
    )
    if parts is None:
        return None
    return torch.cat(parts, piece.dim).narrow(piece.dim, 0, piece.shape[piece.dim])


def _hand_over(piece: Piece, whole: Tensor | None, stage: int, context: ParallelContext) -> Tensor | None:
    """Move the whole piece from tensor-parallel rank 0 of ``stage`` to that of the first stage."""
    if context.tensor_rank != 0 or stage == 0:
        return whole
    if context.pipeline_rank == stage:
        assert whole is not None
        dist.send(_bytes(whole.contiguous()), group=context.pipeline_group, group_dst=0)
        return None
    if context.pipeline_rank == 0:
        received = torch.empty(piece.shape, dtype=piece.dtype, device=context.device)
        dist.recv(_bytes(received), group=context.pipeline_group, group_src=stage)
        return received
    return None


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)


def iter_hf_tensors(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Tensor]]:
    """The model's Hugging Face tensors in ``dtype``; contract of ``stream_pieces``."""
    return stream_pieces(chunks, description, context, Cast(description, dtype))


def save_pretrained(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    output_dir: Path,
    *,
    model_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model as a plain Hugging Face checkpoint, the same files from any layout.

    Args:
        output_dir: made complete beside its place and renamed into it; must not exist or be empty.
        model_dir: where config.json was read from; its tokenizer and generation files are copied.
        dtype: of the stored weights.
        max_file_bytes: a checkpoint beyond this is split into several files with an index.

    Raises:
        UserError: ``output_dir`` holds something.
    """
    conversion = Cast(description, dtype)
    pieces = [piece for placed in written_rows(description) for piece in conversion.pieces(placed)]
    files = HfFiles(output_dir, context)
    config = {**description.config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    with files.writing() as folder:
        tensors = stream_pieces(chunks, description, context, conversion)
        files.write_tensors(folder, [(piece.name, piece.nbytes) for piece in pieces], tensors, max_file_bytes)
        files.write_json(folder, "config.json", config)
        files.copy_side_files(folder, model_dir)
