"""A quantized checkpoint in Hugging Face form, from any tensor x pipeline division, in the layout that is asked for.

Each rank quantizes its own shard. With the amax taken over all ranks and over the modules that engines fuse, the
shards' bytes are the bytes of the whole, cut; what is gathered is 4.5 bits per NVFP4 weight instead of 16. Weights are
cast to BF16 first, and amax, scales and codes all come from that one tensor, so that the files equal what ModelOpt
writes for a BF16 model. One exception: ModelOpt leaves q, k, v and gate, up FP8 scales of their own, and engines then
quantize these weights again with the largest. Here they share the largest from the start, and engines change nothing.
NVFP4 scales are those that the student computed with: frozen or learned ones as they are, refreshed ones from the
weight as it is now, since trained weights move.

How the tensors are called and what config.json says of them is the layout's: ``modelopt.py``,
``compressed_tensors.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.errors import UserError
from megaqad.export import compressed_tensors, modelopt
from megaqad.export.layout import CheckpointLayout
from megaqad.export.manifest import MANIFEST_FILE, Manifest
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.families import HfTensor
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.hf_writer import Piece, stream_pieces, written_rows
from megaqad.models.rows import PlacedRow, linear_modules
from megaqad.models.sharding import local_parameters, take_parts
from megaqad.nvfp4 import global_scale_from_amax, quantize, tensor_amax
from megaqad.quantization.formats import FORMATS, LinearFormat, calibrates_cache
from megaqad.quantization.numbers import EXPORT_DTYPE, fp8_scale, number_format
from megaqad.quantization.recipe import HEAD
from megaqad.quantization.state import weight_scales
from megaqad.runtime.parallel import ParallelContext

LAYOUTS: dict[str, CheckpointLayout] = {"modelopt": modelopt, "compressed_tensors": compressed_tensors}
"""By ``export.format``."""


@dataclass(frozen=True)
class Quantization:
    """What is written quantized; formats and the KV cache are the same on every rank."""

    formats: Mapping[str, LinearFormat]
    """By Hugging Face name of the quantized modules; others stay BF16."""
    input_amax: Mapping[str, float] = field(default_factory=dict)
    """Largest calibrated input by module name, for at least the modules on this rank whose format calibrates it."""
    kv_cache: str = "none"
    """A member of ``formats.KV_CACHE``."""
    cache_amax: Mapping[str, float] = field(default_factory=dict)
    """Largest calibrated key by ``k_proj`` module name and value by ``v_proj``'s, for this rank's layers at least."""


@dataclass(frozen=True)
class QuantizedConversion:
    """Quantize the chosen modules, cast the rest; a ``Conversion`` of ``models.hf_writer``."""

    description: ModelDescription
    context: ParallelContext
    quantization: Quantization
    layout: CheckpointLayout
    weight_scales: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """Of this rank's layers (``state.weight_scales``): where blocks have an amax of their own it is what is written.
    Elsewhere, and without it, scales come from the weight."""

    def _format(self, placed: PlacedRow) -> LinearFormat | None:
        chosen = [
            self.quantization.formats.get(part.module) if part.name.endswith(".weight") else None
            for part in placed.parts
        ]
        assert all(one == chosen[0] for one in chosen), f"{placed.parts[0].module} and its fused siblings differ"
        return chosen[0]

    def pieces(self, placed: PlacedRow) -> list[Piece]:
        dim, chosen = placed.row.shard.dim, self._format(placed)
        pieces = []
        for part in placed.parts:
            size = part.sizes(self.description.dims)
            if chosen is None:
                pieces.append(Piece(part.name, size, EXPORT_DTYPE, dim))
                continue
            for ending, (shape, dtype) in self._stored_shapes(chosen, size).items():
                pieces.append(Piece(f"{part.module}.{ending}", shape, dtype, dim if len(shape) > 1 else None))
        scale = self._cache_scale(torch.ones(()))
        return pieces + [Piece(name, tuple(scale.shape), scale.dtype, None) for name, _ in self._cache_parts(placed)]

    def convert(self, placed: PlacedRow, shards: list[Tensor]) -> list[Tensor]:
        """Collective: one maximum over the tensor-parallel group for a quantized row."""
        cast = [shard.to(EXPORT_DTYPE) for shard in shards]
        chosen, device = self._format(placed), cast[0].device
        tensors: list[Tensor] = []
        if chosen is not None:
            amax, blocks = self._scales(placed, cast)
            for part, shard, block_amax in zip(placed.parts, cast, blocks, strict=True):
                inputs = self.quantization.input_amax[part.module] if chosen.calibrates_inputs else None
                tensors += self._stored(chosen, shard, amax, block_amax, inputs).values()
        else:
            tensors = cast
        cache_amax = self.quantization.cache_amax
        return tensors + [
            self._cache_scale(torch.tensor(cache_amax[module], device=device))
            for _, module in self._cache_parts(placed)
        ]

    def _stored(
        self, chosen: LinearFormat, weight: Tensor, amax: Tensor, block_amax: Tensor | None, input_amax: float | None
    ) -> dict[str, Tensor]:
        """The tensors of a weight shard [N, K] and of its inputs' scale, by the layout's endings.

        Args:
            amax: float32 [] over all shards and fused modules.
            block_amax: of NVFP4 blocks whose scales were chosen.
            input_amax: of calibrated inputs.
        """
        if block_amax is None:
            tensors = number_format(chosen.weights).quantize_weight(weight, amax)
        else:
            assert chosen.weights == "nvfp4", chosen.weights
            packed = quantize(weight, amax, block_amax=block_amax)
            tensors = {
                "weight": packed.codes,
                "weight_scale": packed.block_scales,
                "weight_scale_2": packed.global_scale,
            }
        if input_amax is not None:
            largest = torch.tensor(input_amax, device=weight.device)
            scale_of = global_scale_from_amax if chosen.activations == "nvfp4" else fp8_scale
            tensors["input_scale"] = scale_of(largest)
        return self.layout.stored(chosen.weights, tensors)

    def _stored_shapes(
        self, chosen: LinearFormat, size: tuple[int, ...]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) by ending of the tensors of a weight of ``size`` [N, K], from those of one block."""
        rows, inputs = size
        probe = torch.zeros(1, max(FORMATS[chosen.weights].block, 2), dtype=EXPORT_DTYPE)
        stored = self._stored(chosen, probe, torch.ones(()), None, 1.0 if chosen.calibrates_inputs else None)
        return {
            ending: (
                (rows, inputs * tensor.shape[1] // probe.shape[1]) if tensor.dim() > 1 else tuple(tensor.shape),
                tensor.dtype,
            )
            for ending, tensor in stored.items()
        }

    def _cache_parts(self, placed: PlacedRow) -> list[tuple[str, str]]:
        """(name of the scale, module whose outputs it scales) of the keys and values that this row's layer makes."""
        if placed.row.role != "qkv":
            return []
        _, key, value = (part.module for part in placed.parts)
        names = self.layout.cache_scale_names(self.quantization.kv_cache, key, value)
        return list(zip(names, (key, value), strict=False))

    def _cache_scale(self, amax: Tensor) -> Tensor:
        """As the layout stores it. Engines leave FP8's range to it whatever the cache's format."""
        (scale,) = self.layout.stored("fp8", {"k_scale": fp8_scale(amax)}).values()
        return scale

    def _scales(self, placed: PlacedRow, shards: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """amax float32 [] of the row, and block_amax float32 [N, K / 16] of each part where they were chosen."""
        amax, block_amax = self.weight_scales.get(placed.parts[0].module, (None, None))
        if amax is not None and block_amax is not None:
            ranks = (self.context.tensor_rank, self.context.sizes.tensor)
            return amax, list(take_parts(placed.row, block_amax, self.description, *ranks))
        amax = torch.stack([tensor_amax(shard) for shard in shards]).amax()  # over the modules an engine fuses
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.context.tensor_group)
        return amax, [None] * len(shards)


def export_checkpoint(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    output_dir: Path,
    *,
    model_dir: Path,
    quantization: Quantization,
    layout: str = "modelopt",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model to ``output_dir``; the same bytes from any layout.

    Args:
        chunks: this rank's chunks; only their parameters are read.
        output_dir: must not exist or be empty; appears complete or not at all.
        model_dir: the original checkpoint, for tokenizer and generation files.
        quantization: what to quantize; nothing writes plain BF16.
        layout: a key of ``LAYOUTS``.
        max_file_bytes: weights per file.

    Collectives: those of ``stream_pieces`` and one object gather over all ranks before anything is written.

    Raises:
        UserError: NaN or Inf in a weight, an input amax that is missing or not positive and finite, or an occupied
            ``output_dir``; the same on every rank.
    """
    unknown = set(quantization.formats) - {*linear_modules(description), HEAD}
    assert not unknown, f"not linear modules of this model: {sorted(unknown)}"
    conversion = QuantizedConversion(description, context, quantization, LAYOUTS[layout], weight_scales(chunks))
    _refuse_unfit(chunks, conversion)
    pieces = [piece for placed in written_rows(description) for piece in conversion.pieces(placed)]
    manifest = Manifest()
    files = HfFiles(output_dir, context)
    with files.writing() as folder:
        stream = manifest.watch(stream_pieces(chunks, description, context, conversion))
        files.write_tensors(folder, [(piece.name, piece.nbytes) for piece in pieces], stream, max_file_bytes)
        contents = LAYOUTS[layout].config_files(description, quantization.formats, quantization.kv_cache)
        for name, content in contents.items():
            files.write_json(folder, name, content)
        files.copy_side_files(folder, model_dir)
        if context.is_main:
            small = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
            files.write_json(folder, MANIFEST_FILE, manifest.content(small))


@torch.no_grad()
def _refuse_unfit(chunks: list[CausalLM], conversion: QuantizedConversion) -> None:
    """Look at every weight and input scale on every rank and fail together, before anything is written."""
    context, description = conversion.context, conversion.description
    problem: str | None = None
    for chunk in chunks:
        for placed, parameter in local_parameters(chunk, description):
            ranks = (context.tensor_rank, context.sizes.tensor)
            parts = take_parts(placed.row, parameter.detach(), description, *ranks)
            for part, shard in zip(placed.parts, parts, strict=True):
                problem = problem or _unfit(part, shard.to(EXPORT_DTYPE), conversion)
    problems: list[str | None] = [None] * context.world_size
    dist.all_gather_object(problems, problem)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise UserError(f"export refused: {first}")


def _unfit(part: HfTensor, shard: Tensor, conversion: QuantizedConversion) -> str | None:
    if not bool(torch.isfinite(tensor_amax(shard))):
        nan, inf = int(shard.isnan().sum()), int(shard.isinf().sum())
        return f"{part.name} holds {nan} NaN and {inf} Inf values on one rank; go back to an earlier checkpoint"
    quantization = conversion.quantization
    chosen = quantization.formats.get(part.module)
    if chosen is not None and chosen.calibrates_inputs:
        amax = quantization.input_amax.get(part.module, 0.0)
        if not 0.0 < amax < float("inf"):
            return f"{part.module} has a largest calibrated input of {amax}; calibrate the model before export"
    if calibrates_cache(quantization.kv_cache) and part.module.endswith((".k_proj", ".v_proj")):
        amax = quantization.cache_amax.get(part.module, 0.0)
        if not 0.0 < amax < float("inf"):
            return f"{part.module} has a largest calibrated output of {amax}; calibrate the model before export"
    return None
