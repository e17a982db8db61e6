"""Fill a model from safetensors files, each rank reading only the slices it holds.

safetensors maps the file and copies just the rows or columns asked for, so a rank's peak is its own shard, one slice
and what ``MappedFiles`` keeps. A row-parallel weight is cut along dim 1; the file is row-major, so its slice is
gathered row by row from the map, which the operating system reads ahead.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.encodings import Checkpoint
from megaqad.models.model import Model
from megaqad.models.weights import HfTensor, Weight
from megaqad.nvfp4 import tensor_amax
from megaqad.runtime.agree import together
from megaqad.runtime.mapped import MappedFiles


@dataclass
class ReadStatistics:
    """What one rank took from the files."""

    bytes_read: int = 0
    largest_bytes: int = 0
    """The largest single slice."""
    tensors: int = 0


class SliceReader:
    """Open files of one checkpoint, closed when the reader's ``with`` block ends."""

    def __init__(self, model_dir: Path, rank: int, ranks: int) -> None:
        """``rank`` of ``ranks``: among those that divide each tensor."""
        self._checkpoint = Checkpoint(model_dir)
        self._files = MappedFiles()
        self._rank, self._ranks = rank, ranks
        self.statistics = ReadStatistics()

    def __enter__(self) -> "SliceReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def fill(self, weight: Weight, local: Tensor) -> None:
        """Write this rank's slices of a weight into its local tensor, cast to its dtype.

        Raises:
            UserError: one of them holds NaN or Inf then.
        """
        values = [self.read(part) for part in weight.parts]
        weight.fill(local, values, self._ranks)
        if torch.isfinite(tensor_amax(local)):
            return
        bad = next(
            part for part, value in zip(weight.parts, values, strict=True) if not value.to(local.dtype).isfinite().all()
        )
        path = self._checkpoint.file_of(bad.name)
        raise UserError(f"{path}: {bad.name} holds NaN or Inf; repair the checkpoint, or copy it again")

    def read(self, part: HfTensor) -> Tensor:
        """This rank's slice of one tensor, in the file's dtype, or BF16 of a number format, on the CPU."""
        encoding, box = self._checkpoint.encoding(part.name), part.box(self._rank, self._ranks)
        return self._slice(part.name, box) if encoding is None else encoding.read(self._slice, box)

    def _slice(self, name: str, box: tuple[tuple[int, int], ...]) -> Tensor:
        """Part of a stored tensor, as it is."""
        entry = self._checkpoint.entries[name]
        file = self._files.file(entry.file, entry.end - entry.begin)
        spans = tuple(slice(start, stop) for start, stop in box)
        tensor: Tensor = file.get_slice(name)[spans] if spans else file.get_tensor(name)
        self.statistics.bytes_read += tensor.nbytes
        self.statistics.largest_bytes = max(self.statistics.largest_bytes, tensor.nbytes)
        self.statistics.tensors += 1
        return tensor


@torch.no_grad()
def load_weights(model: Model, model_dir: Path) -> ReadStatistics:
    """Fill every parameter of this rank's chunks from ``model_dir``; cast to the parameters' dtype.

    Call ``check_checkpoint`` first: it turns a wrong file into a clear message. Ranks read at their own pace; then a
    flag over all of them, and the collectives of ``Model.changed``. A tied head that lives on its own stage is read
    from the embedding.

    Returns:
        What this rank read.

    Raises:
        UserError: a tensor that holds NaN or Inf; on every rank.
    """
    with together(), SliceReader(Path(model_dir), model.ranks.tensor_rank, model.ranks.sizes.tensor) as reader:
        for held in model.held:
            reader.fill(held.weight, held.data)
    model.changed()
    return reader.statistics


@torch.no_grad()
def original_values(model: Model, model_dir: Path) -> list[tuple[Tensor, Tensor]]:
    """What ``model_dir`` holds of each parameter that is trained: the values that ``load_weights`` would give it.

    Args:
        model: with ``requires_grad`` on what is trained; its own values are not looked at. Learned scales are no part
            of a checkpoint and are left out.

    Returns:
        Each parameter with a tensor of its own shape, dtype, device and sharding. No collectives.
    """
    originals: dict[Tensor, Tensor] = {}
    with SliceReader(Path(model_dir), model.ranks.tensor_rank, model.ranks.sizes.tensor) as reader:
        for held in model.held:
            if held.parameter.requires_grad:
                original = originals.setdefault(held.parameter, torch.empty_like(held.parameter.data))
                reader.fill(held.weight, held.slice_of(original))
    return list(originals.items())


def load_head(architecture: Architecture, model_dir: Path, rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """Tensor-parallel ``rank``'s rows of the output head [real rows, h], as ``CausalLM.head_weight`` has them.

    For a run that has last hidden states already and needs nothing else of the model. On the CPU; no collectives.
    """
    with SliceReader(Path(model_dir), rank, ranks) as reader:
        return reader.read(architecture.weights[-1].parts[0]).to(dtype)
