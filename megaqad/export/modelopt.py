"""An NVFP4 checkpoint in ModelOpt's unified Hugging Face layout, from any tensor x pipeline division.

A quantized linear of shape [N, K] becomes four tensors; everything else keeps its name, in BF16:

    weight          uint8          [N, K / 2]   two codes per byte, the even element in the low nibble
    weight_scale    float8_e4m3fn  [N, K / 16]  block scales, row-major
    weight_scale_2  float32        []           amax / 2688, the same for q, k, v and for gate, up
    input_scale     float32        []           amax / 2688 of the calibrated inputs; not with weight-only quantization

Each rank quantizes its own shard. With the amax taken over all ranks and over the modules that engines fuse, the
shards' bytes are the bytes of the whole, cut; what is gathered is 4.5 bits per weight instead of 16. Weights are cast
to BF16 first, and amax, scales and codes all come from that one tensor, so that the files equal what ModelOpt writes
for a BF16 model. Scales are those that the student computed with: frozen or learned ones as they are, refreshed ones
from the weight as it is now, since trained weights move.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.errors import UserError
from megaqad.export.manifest import MANIFEST_FILE, Manifest
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.families import HfTensor, PlacedRow, linear_modules
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.hf_writer import Piece, stream_pieces, written_rows
from megaqad.models.sharding import local_parameters, take_parts
from megaqad.nvfp4 import BLOCK_SIZE, global_scale_from_amax, quantize, tensor_amax
from megaqad.quantization.state import weight_scales
from megaqad.runtime.parallel import ParallelContext

EXPORT_DTYPE = torch.bfloat16
LAYOUT = {"name": "modelopt", "version": "0.47.0"}
"""The producer that readers are told. Engines recognise the layout by this name, so it names the layout's owner and
the release it was compared with; who wrote the files is said in the manifest."""


@dataclass(frozen=True)
class NVFP4Conversion:
    """Quantize the chosen modules, cast the rest; a ``Conversion`` of ``models.hf_writer``."""

    description: ModelDescription
    context: ParallelContext
    modules: frozenset[str]
    """Hugging Face names of the quantized modules, the same on every rank."""
    input_amax: Mapping[str, float] | None
    """Largest calibrated input by module, for this rank's layers at least; None for weight-only."""
    weight_scales: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """Of this rank's layers (``state.weight_scales``): where blocks have an amax of their own it is what is written.
    Elsewhere, and without it, scales come from the weight."""

    def _quantizes(self, placed: PlacedRow) -> bool:
        chosen = [part.module in self.modules for part in placed.parts]
        if placed.row.role is None:
            return False
        assert all(chosen) or not any(chosen), f"{placed.parts[0].module} and its fused siblings must be chosen alike"
        return chosen[0]

    def pieces(self, placed: PlacedRow) -> list[Piece]:
        dim = placed.row.shard.dim
        sizes = [part.sizes(self.description.dims) for part in placed.parts]
        if not self._quantizes(placed):
            return [Piece(part.name, size, EXPORT_DTYPE, dim) for part, size in zip(placed.parts, sizes, strict=True)]
        return [
            piece for part, size in zip(placed.parts, sizes, strict=True) for piece in self._packed(part, size, dim)
        ]

    def _packed(self, part: HfTensor, size: tuple[int, ...], dim: int | None) -> list[Piece]:
        """The tensors of one quantized linear."""
        rows, inputs = size
        pieces = [
            Piece(f"{part.module}.weight", (rows, inputs // 2), torch.uint8, dim),
            Piece(f"{part.module}.weight_scale", (rows, inputs // BLOCK_SIZE), torch.float8_e4m3fn, dim),
            Piece(f"{part.module}.weight_scale_2", (), torch.float32, None),
        ]
        if self.input_amax is not None:
            pieces.append(Piece(f"{part.module}.input_scale", (), torch.float32, None))
        return pieces

    def convert(self, placed: PlacedRow, shards: list[Tensor]) -> list[Tensor]:
        """Collective: one maximum over the tensor-parallel group for a quantized row."""
        cast = [shard.to(EXPORT_DTYPE) for shard in shards]
        if not self._quantizes(placed):
            return cast
        amax, blocks = self._scales(placed, cast)
        tensors: list[Tensor] = []
        for part, shard, block_amax in zip(placed.parts, cast, blocks, strict=True):
            packed = quantize(shard, amax, block_amax=block_amax)
            tensors += [packed.codes, packed.block_scales, packed.global_scale]
            if self.input_amax is not None:
                largest = torch.tensor(self.input_amax[part.module], dtype=torch.float32, device=shard.device)
                tensors.append(global_scale_from_amax(largest))
        return tensors

    def _scales(self, placed: PlacedRow, shards: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """amax float32 [] of the row, and block_amax float32 [N, K / 16] of each part where they were chosen."""
        amax, block_amax = self.weight_scales.get(placed.parts[0].module, (None, None))
        if amax is not None and block_amax is not None:
            ranks = (self.context.tensor_rank, self.context.sizes.tensor)
            return amax, list(take_parts(placed.row, block_amax, self.description, *ranks))
        amax = torch.stack([tensor_amax(shard) for shard in shards]).amax()  # over the modules an engine fuses
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.context.tensor_group)
        return amax, [None] * len(shards)


def export_modelopt(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    output_dir: Path,
    *,
    model_dir: Path,
    modules: Collection[str],
    input_amax: Mapping[str, float] | None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model to ``output_dir``; the same bytes from any layout.

    Args:
        chunks: this rank's chunks; only their parameters are read.
        output_dir: must not exist or be empty; appears complete or not at all.
        model_dir: the original checkpoint, for tokenizer and generation files.
        modules: Hugging Face names of the modules to quantize, the same on every rank; none writes plain BF16.
        input_amax: largest calibrated input by module name for at least the modules on this rank; None writes the
            weight-only form (W4A16).
        max_file_bytes: weights per file.

    Collectives: those of ``stream_pieces`` and one object gather over all ranks before anything is written.

    Raises:
        UserError: NaN or Inf in a weight, an input amax that is missing or not positive and finite, or an occupied
            ``output_dir``; the same on every rank.
    """
    chosen = frozenset(modules)
    unknown = chosen - set(linear_modules(description))
    assert not unknown, f"not linear modules of this model: {sorted(unknown)}"
    conversion = NVFP4Conversion(description, context, chosen, input_amax, weight_scales(chunks))
    _refuse_unfit(chunks, conversion)
    pieces = [piece for placed in written_rows(description) for piece in conversion.pieces(placed)]
    manifest = Manifest()
    files = HfFiles(output_dir, context)
    with files.writing() as folder:
        stream = manifest.watch(stream_pieces(chunks, description, context, conversion))
        files.write_tensors(folder, [(piece.name, piece.nbytes) for piece in pieces], stream, max_file_bytes)
        for name, content in config_files(description, chosen, weight_only=input_amax is None).items():
            files.write_json(folder, name, content)
        files.copy_side_files(folder, model_dir)
        if context.is_main:
            small = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
            files.write_json(folder, MANIFEST_FILE, manifest.content(small))


@torch.no_grad()
def _refuse_unfit(chunks: list[CausalLM], conversion: NVFP4Conversion) -> None:
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


def _unfit(part: HfTensor, shard: Tensor, conversion: NVFP4Conversion) -> str | None:
    if not bool(torch.isfinite(tensor_amax(shard))):
        nan, inf = int(shard.isnan().sum()), int(shard.isinf().sum())
        return f"{part.name} holds {nan} NaN and {inf} Inf values on one rank; go back to an earlier checkpoint"
    if conversion.input_amax is not None and part.module in conversion.modules:
        amax = conversion.input_amax.get(part.module, 0.0)
        if not 0.0 < amax < float("inf"):
            return f"{part.module} has a largest calibrated input of {amax}; calibrate the model before export"
    return None


def config_files(
    description: ModelDescription, modules: Collection[str], *, weight_only: bool
) -> dict[str, dict[str, Any]]:
    """config.json with its ``quantization_config``, and hf_quant_config.json; the same facts in both.

    ``exclude_modules`` holds full module names: engines also match substrings, under which ``layers.1`` would mean
    ``layers.10`` too.
    """
    config = {**description.config, "dtype": str(EXPORT_DTYPE).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if not modules:
        return {"config.json": config}
    excluded = [name for name in linear_modules(description) if name not in modules]
    excluded += ["lm_head", "model.embed_tokens"]
    algorithm = "W4A16_NVFP4" if weight_only else "NVFP4"
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    group = {"weights": number, "targets": ["Linear"]}
    if not weight_only:
        group["input_activations"] = number
    config["quantization_config"] = {
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "quant_algo": algorithm,
        "producer": LAYOUT,
        "quant_method": "modelopt",
    }
    return {
        "config.json": config,
        "hf_quant_config.json": {
            "producer": LAYOUT,
            "quantization": {
                "quant_algo": algorithm,
                "kv_cache_quant_algo": None,
                "group_size": BLOCK_SIZE,
                "exclude_modules": excluded,
            },
        },
    }
