"""A quantized checkpoint in ModelOpt's unified Hugging Face layout, from any tensor x pipeline division.

A quantized linear of shape [N, K] becomes several tensors; everything else keeps its name, in BF16:

                    NVFP4                       FP8                     MXFP8               MXFP4
    weight          uint8 [N, K / 2]            float8_e4m3fn [N, K]    as FP8              as NVFP4
    weight_scale    float8_e4m3fn [N, K / 16]   float32 []              uint8 [N, K / 32]   uint8 [N, K / 32]
    weight_scale_2  float32 []                  -                       -                   -
    input_scale     float32 []                  float32 []              -                   -

Four-bit codes lie two to a byte, the even element in the low nibble; block scales row-major. Per-tensor scales are
amax / 2688 (NVFP4) or amax / 448 (FP8), the same for q, k, v and for gate, up; weight-only NVFP4 has no input scale. A
quantized KV cache adds ``k_proj.k_scale`` and ``v_proj.v_scale``, float32 []: amax / 448 for NVFP4 as well, where
engines put the range of four-bit codes in themselves. Caches under a scale of 1 have none: engines take 1 then.

With dynamic input scales (``quantization.activation_scales``) there is no ``input_scale``, and both configuration files
say ``activation_scheme: dynamic`` beside ModelOpt's keys, the contract that vLLM's pull request 49715 proposes;
``config_groups`` say it in their own words. TensorRT-LLM reads such files: where the scale is missing it takes one
from the tensor of each call. vLLM 0.33 and SGLang make room for the scale and use what is there when none comes (memory
as it was, or 1.0), so they need calibrated ones.

Each rank quantizes its own shard. With the amax taken over all ranks and over the modules that engines fuse, the
shards' bytes are the bytes of the whole, cut; what is gathered is 4.5 bits per NVFP4 weight instead of 16. Weights are
cast to BF16 first, and amax, scales and codes all come from that one tensor, so that the files equal what ModelOpt
writes for a BF16 model. One exception: ModelOpt leaves q, k, v and gate, up FP8 scales of their own, and engines then
quantize these weights again with the largest. Here they share the largest from the start, and engines change nothing.
NVFP4 scales are those that the student computed with: frozen or learned ones as they are, refreshed ones from the
weight as it is now, since trained weights move.
"""

from collections.abc import Mapping
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
from megaqad.models.families import HfTensor
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.hf_writer import Piece, stream_pieces, written_rows
from megaqad.models.rows import PlacedRow, linear_modules
from megaqad.models.sharding import local_parameters, take_parts
from megaqad.nvfp4 import global_scale_from_amax, quantize, tensor_amax
from megaqad.quantization.formats import FORMATS, LinearFormat, cache_number, calibrates_cache
from megaqad.quantization.numbers import EXPORT_DTYPE, fp8_scale, number_format
from megaqad.quantization.recipe import HEAD
from megaqad.quantization.state import weight_scales
from megaqad.runtime.parallel import ParallelContext

KV_SCHEMES: dict[str, Any] = {"fp8": {"dynamic": False, "num_bits": 8, "type": "float"}, "nvfp4": "NVFP4"}
"""ModelOpt's ``kv_cache_scheme``."""
WITH_GROUP_SIZE = ("nvfp4", "mxfp8")
"""Formats whose ``quantized_layers`` entry holds a group size."""
WITH_CONFIG_GROUP = ("FP8", "NVFP4", "W4A16_NVFP4")
"""What ModelOpt describes in config.json when it is the only ``quant_algo``; of others it gives the name."""
DYNAMIC = "dynamic"
"""``activation_scheme`` of an export without input scales; with them nothing is said, as ModelOpt does."""
LAYOUT = {"name": "modelopt", "version": "0.47.0"}
"""The producer that readers are told. Engines recognise the layout by this name, so it names the layout's owner and
the release it was compared with; who wrote the files is said in the manifest."""


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
            for ending, (shape, dtype) in _packed_shapes(chosen.weights, size).items():
                pieces.append(Piece(f"{part.module}.{ending}", shape, dtype, dim if shape else None))
            if chosen.calibrates_inputs:
                pieces.append(Piece(f"{part.module}.input_scale", (), torch.float32, None))
        return pieces + [Piece(name, (), torch.float32, None) for name, _ in self._cache_parts(placed)]

    def convert(self, placed: PlacedRow, shards: list[Tensor]) -> list[Tensor]:
        """Collective: one maximum over the tensor-parallel group for a quantized row."""
        cast = [shard.to(EXPORT_DTYPE) for shard in shards]
        chosen, device = self._format(placed), cast[0].device
        tensors: list[Tensor] = []
        if chosen is not None:
            amax, blocks = self._scales(placed, cast)
            for part, shard, block_amax in zip(placed.parts, cast, blocks, strict=True):
                tensors += _packed(chosen.weights, shard, amax, block_amax)
                if chosen.calibrates_inputs:
                    largest = torch.tensor(self.quantization.input_amax[part.module], device=device)
                    tensors.append(_scale(chosen.activations, largest))
        else:
            tensors = cast
        cache_amax = self.quantization.cache_amax
        return tensors + [
            fp8_scale(torch.tensor(cache_amax[module], device=device)) for _, module in self._cache_parts(placed)
        ]

    def _cache_parts(self, placed: PlacedRow) -> list[tuple[str, str]]:
        """(name of the scale, module whose outputs it scales) of the keys and values that this row's layer makes."""
        if not calibrates_cache(self.quantization.kv_cache) or placed.row.role != "qkv":
            return []
        _, key, value = (part.module for part in placed.parts)
        return [(f"{key}.k_scale", key), (f"{value}.v_scale", value)]

    def _scales(self, placed: PlacedRow, shards: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """amax float32 [] of the row, and block_amax float32 [N, K / 16] of each part where they were chosen."""
        amax, block_amax = self.weight_scales.get(placed.parts[0].module, (None, None))
        if amax is not None and block_amax is not None:
            ranks = (self.context.tensor_rank, self.context.sizes.tensor)
            return amax, list(take_parts(placed.row, block_amax, self.description, *ranks))
        amax = torch.stack([tensor_amax(shard) for shard in shards]).amax()  # over the modules an engine fuses
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.context.tensor_group)
        return amax, [None] * len(shards)


def _packed(number: str, weight: Tensor, amax: Tensor, block_amax: Tensor | None) -> list[Tensor]:
    """The tensors of a weight shard [N, K] under a shared ``amax``; ``block_amax`` of NVFP4 blocks that were chosen."""
    if block_amax is None:
        return list(number_format(number).quantize_weight(weight, amax).values())
    assert number == "nvfp4", number
    packed = quantize(weight, amax, block_amax=block_amax)
    return [packed.codes, packed.block_scales, packed.global_scale]


def _scale(number: str, amax: Tensor) -> Tensor:
    """The float32 [] scale by which engines divide inputs, keys and values."""
    return global_scale_from_amax(amax) if number == "nvfp4" else fp8_scale(amax)


def _packed_shapes(number: str, size: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the tensors of a weight of ``size`` [N, K], from those of one block."""
    block = FORMATS[number].block
    probe = torch.zeros(1, max(block, 2), dtype=EXPORT_DTYPE)
    packed = number_format(number).quantize_weight(probe, torch.ones(()))
    rows, inputs = size
    return {
        ending: ((rows, inputs * tensor.shape[1] // probe.shape[1]) if tensor.dim() else (), tensor.dtype)
        for ending, tensor in packed.items()
    }


def export_modelopt(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    output_dir: Path,
    *,
    model_dir: Path,
    quantization: Quantization,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model to ``output_dir``; the same bytes from any layout.

    Args:
        chunks: this rank's chunks; only their parameters are read.
        output_dir: must not exist or be empty; appears complete or not at all.
        model_dir: the original checkpoint, for tokenizer and generation files.
        quantization: what to quantize; nothing writes plain BF16.
        max_file_bytes: weights per file.

    Collectives: those of ``stream_pieces`` and one object gather over all ranks before anything is written.

    Raises:
        UserError: NaN or Inf in a weight, an input amax that is missing or not positive and finite, or an occupied
            ``output_dir``; the same on every rank.
    """
    unknown = set(quantization.formats) - {*linear_modules(description), HEAD}
    assert not unknown, f"not linear modules of this model: {sorted(unknown)}"
    conversion = QuantizedConversion(description, context, quantization, weight_scales(chunks))
    _refuse_unfit(chunks, conversion)
    pieces = [piece for placed in written_rows(description) for piece in conversion.pieces(placed)]
    manifest = Manifest()
    files = HfFiles(output_dir, context)
    with files.writing() as folder:
        stream = manifest.watch(stream_pieces(chunks, description, context, conversion))
        files.write_tensors(folder, [(piece.name, piece.nbytes) for piece in pieces], stream, max_file_bytes)
        for name, content in config_files(description, quantization.formats, quantization.kv_cache).items():
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


def config_files(
    description: ModelDescription, formats: Mapping[str, LinearFormat], kv_cache: str = "none"
) -> dict[str, dict[str, Any]]:
    """config.json with its ``quantization_config``, and hf_quant_config.json; the same facts in both.

    One format for all quantized modules is said once, with the list of what is excluded; several are said module by
    module (``MIXED_PRECISION``). ``exclude_modules`` holds full module names: engines also match substrings, under
    which ``layers.1`` would mean ``layers.10`` too.
    """
    config = {**description.config, "dtype": str(EXPORT_DTYPE).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    if not formats:
        return {"config.json": config}
    scheme = {"activation_scheme": DYNAMIC} if any(chosen.dynamic for chosen in formats.values()) else {}
    excluded = [name for name in [*linear_modules(description), HEAD] if name not in formats]
    layers = {name: _algorithm(formats[name]) for name in [*linear_modules(description), HEAD] if name in formats}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, algorithm in layers.items():
        groups.setdefault(tuple(algorithm.items()), []).append(name)
    details: dict[str, Any]
    if len(groups) == 1:
        details = {**next(iter(layers.values())), "exclude_modules": [*excluded, "model.embed_tokens"]}
        targets = [["Linear"]]
    else:
        details = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        targets = [sorted(names) for names in groups.values()]
    numbers = [_numbers(formats[names[0]]) for names in groups.values()]
    described = "quantized_layers" in details or details["quant_algo"] in WITH_CONFIG_GROUP
    config_groups = {
        f"group_{index}": {**number, "targets": target}
        for index, (number, target) in enumerate(zip(numbers, targets, strict=True))
    }
    config["quantization_config"] = {
        **({"config_groups": config_groups} if described else {}),
        "ignore": details.get("exclude_modules", []),
        "quant_algo": details["quant_algo"],
        "producer": LAYOUT,
        "quant_method": "modelopt",
        **scheme,
    }
    if "quantized_layers" in details:
        config["quantization_config"]["quantized_layers"] = layers
    number = cache_number(kv_cache)
    if number is not None:
        config["quantization_config"]["kv_cache_scheme"] = KV_SCHEMES[number]
    kv_algorithm = None if number is None else number.upper()
    details = {"kv_cache_quant_algo": kv_algorithm, **details, **scheme}
    return {"config.json": config, "hf_quant_config.json": {"producer": LAYOUT, "quantization": details}}


def _algorithm(chosen: LinearFormat) -> dict[str, Any]:
    """One module's entry in ``quantized_layers``."""
    grouped = {"group_size": chosen.facts.block} if chosen.weights in WITH_GROUP_SIZE else {}
    return {"quant_algo": chosen.algorithm, **grouped}


def _numbers(chosen: LinearFormat) -> dict[str, Any]:
    """One ``config_groups`` entry without its targets."""
    number = {"dynamic": False, "num_bits": int(chosen.facts.bits), "type": "float"}
    if chosen.facts.block > 1:
        number["group_size"] = chosen.facts.block
    if chosen.activations == "none":
        return {"weights": number}
    return {"weights": number, "input_activations": {**number, "dynamic": chosen.dynamic}}
