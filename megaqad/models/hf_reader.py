"""Fill a model from safetensors files, each rank reading only the slices it holds.

safetensors maps the file and copies just the rows or columns asked for, so a rank's peak is its own shard plus one
slice. A row-parallel weight is cut along dim 1; the file is row-major, so its slice is gathered row by row from the
map, which the operating system reads ahead.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaqad.models.causal_lm import CausalLM, vocab_shard
from megaqad.models.checkpoint_files import read_headers
from megaqad.models.description import ModelDescription
from megaqad.models.families import HfTensor, Row
from megaqad.models.rows import PlacedRow
from megaqad.models.sharding import fill_parts, local_parameters, shard_range


@dataclass
class ReadStatistics:
    """What one rank took from the files."""

    bytes_read: int = 0
    largest_bytes: int = 0
    """The largest single slice."""
    tensors: int = 0


class _SliceReader:
    """Open files of one checkpoint, closed when the reader's ``with`` block ends."""

    def __init__(self, model_dir: Path, rank: int, ranks: int) -> None:
        self._files = {name: entry.file for name, entry in read_headers(model_dir).items()}
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._rank, self._ranks = rank, ranks
        self.statistics = ReadStatistics()

    def __enter__(self) -> "_SliceReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, placed: PlacedRow, parameter: Tensor, description: ModelDescription) -> None:
        """Write this rank's slices of a row into its Megatron parameter, cast to its dtype."""
        shards = [self.read(placed.row, part) for part in placed.parts]
        fill_parts(placed.row, parameter, shards, description)

    def read(self, row: Row, part: HfTensor) -> Tensor:
        """This rank's slice of one tensor, in the file's dtype, on the CPU."""
        path = self._files[part.name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        whole = self._open[path].get_slice(part.name)
        if row.shard.dim is None:
            tensor = whole[:]
        else:
            start, stop = shard_range(row, whole.get_shape()[row.shard.dim], self._rank, self._ranks)
            tensor = whole[start:stop] if row.shard.dim == 0 else whole[:, start:stop]
        size = tensor.numel() * tensor.element_size()
        self.statistics.bytes_read += size
        self.statistics.largest_bytes = max(self.statistics.largest_bytes, size)
        self.statistics.tensors += 1
        return tensor


@torch.no_grad()
def load_weights(chunks: list[CausalLM], description: ModelDescription, model_dir: Path) -> ReadStatistics:
    """Fill every parameter of this rank's chunks from ``model_dir``; cast to the parameters' dtype.

    Call ``check_checkpoint`` first: it turns a wrong file into a clear message. No collectives, so ranks may read at
    their own pace. A tied head that lives on its own stage is read from the embedding.

    Returns:
        What this rank read.
    """
    group = chunks[0].tp_group
    with _SliceReader(Path(model_dir), group.rank(), group.size()) as reader:
        for chunk in chunks:
            for placed, parameter in local_parameters(chunk, description):
                reader.fill(placed, parameter.data, description)
        return reader.statistics


@torch.no_grad()
def original_values(
    chunks: Sequence[CausalLM], description: ModelDescription, model_dir: Path
) -> list[tuple[nn.Parameter, Tensor]]:
    """What ``model_dir`` holds of each parameter that is trained: the values that ``load_weights`` would give it.

    Args:
        chunks: this rank's, with ``requires_grad`` on what is trained; their own values are not looked at. Learned
            scales are no part of a checkpoint and are left out.

    Returns:
        Each parameter with a tensor of its own shape, dtype, device and sharding. No collectives.
    """
    originals = []
    group = chunks[0].tp_group
    with _SliceReader(Path(model_dir), group.rank(), group.size()) as reader:
        for chunk in chunks:
            for placed, parameter in local_parameters(chunk, description):
                if parameter.requires_grad:
                    original = torch.empty_like(parameter.data)
                    reader.fill(placed, original, description)
                    originals.append((parameter, original))
    return originals


def load_head(description: ModelDescription, model_dir: Path, rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """Tensor-parallel ``rank``'s rows of the output head [real rows, h], as ``CausalLM.head_weight`` has them.

    For whoever has last hidden states already and needs nothing else of the model. On the CPU; no collectives.
    """
    name = "model.embed_tokens.weight" if description.tied_embeddings else "lm_head.weight"
    start, real, _ = vocab_shard(description.vocab_size, rank, ranks)
    with safe_open(read_headers(Path(model_dir))[name].file, framework="pt") as file:
        rows: Tensor = file.get_slice(name)[start : start + real]
    return rows.to(dtype)
