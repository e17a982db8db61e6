"""Take a divided model apart into Hugging Face tensors, one at a time, on one rank.

Every tensor takes the same way: the tensor-parallel ranks of the stage that holds it convert their shards (a cast to
BF16 here, quantization in ``export``), the first of them gathers the parts and hands the whole to the main rank, which
yields it. One writer means that the files do not depend on the layout: any division gives the same bytes. Experts come
from the expert-parallel ranks that hold them. Memory on any rank: one whole tensor, converted.

What travels is bytes, viewed as uint8: process groups then need not know float8 or packed codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.architecture import Architecture
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.model import Held, Model
from megaqad.models.weights import WHOLE, HfTensor, Weight
from megaqad.runtime.files import Description
from megaqad.runtime.ranks import Ranks


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint to be written, or some rows of one."""

    tensor: HfTensor
    """Name, whole shape, rows and cut, as it is stored."""
    dtype: torch.dtype

    @property
    def description(self) -> Description:
        """Of the whole tensor."""
        return Description.of(self.tensor.name, self.tensor.shape, self.dtype)


class Conversion(Protocol):
    """What becomes of the Hugging Face tensors of one weight."""

    def stored(self, weight: Weight) -> list[Stored]:
        """The tensors that ``convert`` gives; known on every rank."""
        ...

    def convert(self, held: Held, shards: list[Tensor]) -> list[Tensor]:
        """This rank's share of each of them, from its shards of ``weight.parts``; no collectives."""
        ...


@dataclass(frozen=True)
class Cast:
    """Keep every tensor, in one dtype."""

    dtype: torch.dtype

    def stored(self, weight: Weight) -> list[Stored]:
        return [Stored(part, self.dtype) for part in weight.parts]

    def convert(self, held: Held, shards: list[Tensor]) -> list[Tensor]:
        return [shard.to(self.dtype) for shard in shards]


def stored_tensors(architecture: Architecture, conversion: Conversion) -> list[Description]:
    """Every tensor in the order of ``stream_tensors``."""
    stored = (one for weight in architecture.stored_weights for one in conversion.stored(weight))
    return list({one.tensor.name: one.description for one in stored}.values())


@torch.no_grad()
def stream_tensors(model: Model, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) in checkpoint order, on the main rank; nothing on the others.

    Every rank must run the iterator to its end. Collectives: per tensor one gather over the tensor-parallel ranks that
    hold it and one send to the main rank; of data-parallel replicas the first takes part, and of those that hold other
    experts the ones that do.
    """
    held = {one.weight: one for one in model.held}
    for weight in model.architecture.stored_weights:
        source = _Source.of(weight, model)
        if not source.takes_part and not model.ranks.is_main:
            continue
        stored = conversion.stored(weight)
        shards: list[Tensor] | None = None
        if source.takes_part:
            tensor = model.ranks.sizes.tensor
            shards = conversion.convert(held[weight], weight.take(held[weight].data, model.ranks.tensor_rank, tensor))
        wholes = [source.hand_over(one, None if shards is None else shards[index]) for index, one in enumerate(stored)]
        if model.ranks.is_main:
            yield from _joined_rows(stored, [whole.cpu() for whole in wholes if whole is not None])


def _joined_rows(stored: Sequence[Stored], wholes: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Rows of one tensor that come as several parts, put together again; what these parts share comes once."""
    parts: dict[str, list[Tensor]] = {}
    for one, whole in zip(stored, wholes, strict=True):
        of_name = parts.setdefault(one.tensor.name, [])
        if one.tensor.rows is not None or not of_name:
            of_name.append(whole)
    for name, tensors in parts.items():
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class _Source:
    """The ranks that give a weight, and the way from them to the main rank."""

    ranks: Ranks
    first: int
    """Global rank of the tensor-parallel rank that gathers."""
    takes_part: bool
    """Whether this rank holds a part that is wanted."""

    @classmethod
    def of(cls, weight: Weight, model: Model) -> "_Source":
        ranks = model.ranks
        first = ranks.rank_of(stage=model.stage_of(weight), expert_rank=model.expert_rank_of(weight))
        return cls(ranks, first, ranks.rank - ranks.tensor_rank == first)

    def hand_over(self, stored: Stored, shard: Tensor | None) -> Tensor | None:
        """The whole of it on the main rank, None elsewhere."""
        whole = None if shard is None else self._gather(stored, shard)
        if self.first == 0:
            return whole
        if self.ranks.rank == self.first:
            assert whole is not None
            dist.send(_bytes(whole.contiguous()), dst=0)
        if not self.ranks.is_main:
            return None
        received = torch.empty(stored.tensor.size, dtype=stored.dtype, device=self.ranks.device)
        dist.recv(_bytes(received), src=self.first)
        return received

    def _gather(self, stored: Stored, shard: Tensor) -> Tensor | None:
        """The whole on tensor-parallel rank 0, None on the others."""
        assert shard.dtype is stored.dtype, f"{stored.tensor.name}: {shard.dtype} instead of {stored.dtype}"
        ranks, cut = self.ranks.sizes.tensor, stored.tensor.cut
        if cut.dim is None or ranks == 1:
            return shard if self.ranks.tensor_rank == 0 else None
        size = stored.tensor.size[cut.dim]
        spans = [cut.span(size, rank, ranks) for rank in range(ranks)]
        longest = max(stop - start for start, stop in spans)
        if shard.shape[cut.dim] == longest:
            equal = shard.contiguous()
        else:
            equal = shard.new_zeros(*shard.shape[: cut.dim], longest, *shard.shape[cut.dim + 1 :])
            equal.narrow(cut.dim, 0, shard.shape[cut.dim]).copy_(shard)
        group = self.ranks.tensor_group
        if self.ranks.tensor_rank > 0:
            dist.gather(_bytes(equal), group=group, group_dst=0)
            return None
        together = equal.new_empty(ranks, *equal.shape)
        dist.gather(_bytes(equal), [_bytes(part) for part in together], group=group, group_dst=0)
        if cut.dim == 0 and all(cut.is_first(rank, ranks) for rank in range(ranks)):
            return together.flatten(0, 1)[:size]  # they lie one after the other already
        own = [
            part.narrow(cut.dim, 0, stop - start)
            for rank, (part, (start, stop)) in enumerate(zip(together, spans, strict=True))
            if cut.is_first(rank, ranks)
        ]
        return torch.cat(own, cut.dim)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)


def scalar(name: str, shape: tuple[int, ...] = ()) -> HfTensor:
    """A tensor of one element that every rank has."""
    return HfTensor(name, shape, WHOLE)


def reshaped(part: HfTensor, name: str, columns: int) -> HfTensor:
    """A tensor [N, columns] that lies as ``part`` [N, K] does, under another name."""
    return replace(part, name=name, shape=(part.shape[0], columns))


def save_pretrained(
    model: Model,
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
    conversion = Cast(dtype)
    files = HfFiles(output_dir, model.ranks)
    config = {**model.architecture.config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # of a source that was itself quantized
    with files.writing() as folder:
        described = stored_tensors(model.architecture, conversion)
        files.write_tensors(folder, described, stream_tensors(model, conversion), max_file_bytes)
        files.write_json(folder, "config.json", config)
        files.copy_side_files(folder, model_dir)
