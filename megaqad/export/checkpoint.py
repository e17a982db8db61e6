"""A quantized checkpoint in Hugging Face form, from any tensor x pipeline division, in the layout that is asked for.

Nothing is computed here: a site says what is stored of its weights (``quantization.site``), everything else is cast to
BF16. Each rank gives its own shard. With the amax taken over all ranks and over the modules that engines fuse, the
shards' bytes are the bytes of the whole, cut; what is gathered is 4.5 bits per NVFP4 weight instead of 16. Weights are
cast to BF16 first, and amax, scales and codes all come from that one tensor, so that the files equal what ModelOpt
writes for a BF16 model. One exception: ModelOpt leaves q, k, v and gate, up FP8 scales of their own, and engines then
quantize these weights again with the largest. Here they share the largest from the start, and engines change nothing.
Scales are those that the student computes with.

How the tensors are called and what config.json says of them is the layout's: ``modelopt.py``,
``compressed_tensors.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megaqad.export import compressed_tensors, modelopt
from megaqad.export.layout import CheckpointLayout
from megaqad.export.manifest import MANIFEST_FILE, Manifest
from megaqad.models.blocks.attention import Attention
from megaqad.models.carry import carried_tensors, read_carried
from megaqad.models.hf_files import MAX_FILE_BYTES, HfFiles
from megaqad.models.model import Held, Model
from megaqad.models.weights import HfTensor, Weight
from megaqad.models.write import Stored, reshaped, scalar, stored_tensors, stream_tensors
from megaqad.nvfp4 import tensor_amax
from megaqad.quantization.formats import FORMATS, LinearFormat
from megaqad.quantization.model import cache_sites, weight_sites
from megaqad.quantization.numbers import EXPORT_DTYPE, number_format
from megaqad.quantization.plan import QuantizationPlan
from megaqad.quantization.site import CacheSite, WeightSite
from megaqad.runtime.agree import raise_together
from megaqad.runtime.files import Description

LAYOUTS: dict[str, CheckpointLayout] = {"modelopt": modelopt, "compressed_tensors": compressed_tensors}
"""By ``export.format``."""


@dataclass(frozen=True)
class QuantizedConversion:
    """What sites store, and everything else in BF16; a ``Conversion`` of ``models.write``."""

    plan: QuantizationPlan
    layout: CheckpointLayout
    sites: Mapping[Weight, tuple[WeightSite, int]]
    """Of the quantized weights on this rank, and which of the site's weights it is."""
    caches: Mapping[str, CacheSite]
    """Of the KV caches on this rank, by the module that makes the keys."""
    keys: Mapping[Weight, Attention]
    """The attention that each weight of queries, keys and values belongs to."""

    @classmethod
    def of(cls, model: Model, plan: QuantizationPlan, layout: CheckpointLayout) -> "QuantizedConversion":
        """``model``: quantized by ``plan``, switched on."""
        sites = {weight: (site, place) for site in weight_sites(model) for place, weight in enumerate(site.weights)}
        attentions = {attention.qkv.parts: attention for attention in model.architecture.attentions}
        keys = {weight: attentions[weight.parts] for weight in model.architecture.linears if weight.parts in attentions}
        return cls(plan, layout, sites, {site.names[0]: site for site in cache_sites(model)}, keys)

    def stored(self, weight: Weight) -> list[Stored]:
        chosen = self.plan.format_of(weight) if weight.linear or weight.layer is None else None
        stored = []
        for part in weight.parts:
            if chosen is None or not part.name.endswith(".weight"):
                stored.append(Stored(part, EXPORT_DTYPE))
                continue
            for ending, (shape, dtype) in _stored_shapes(chosen, self.layout).items():
                name = f"{part.module}.{ending}"
                columns = part.shape[1] * shape[1] // _PROBE if len(shape) > 1 else 0
                stored.append(Stored(reshaped(part, name, columns) if columns else scalar(name, shape), dtype))
        return stored + [Stored(scalar(name, shape), torch.float32) for name, shape in self._cache_scales(weight)]

    def convert(self, held: Held, shards: list[Tensor]) -> list[Tensor]:
        cast = [shard.to(EXPORT_DTYPE) for shard in shards]
        tensors: list[Tensor] = cast
        if held.weight in self.sites:
            site, place = self.sites[held.weight]
            stored = site.stored(place, cast, held.ranks)
            tensors = [
                one for packed in stored for one in self.layout.stored(site.quantization.weights, packed).values()
            ]
        attention = self.keys.get(held.weight)
        if attention is not None and self._cache_scales(held.weight):
            cache_site = self.caches[attention.key_module]
            for module in (attention.key_module, attention.value_module):
                tensors += self.layout.stored("fp8", cache_site.stored(module)).values()
        return tensors

    def _cache_scales(self, weight: Weight) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of the scales of the keys and values that a weight makes."""
        attention = self.keys.get(weight)
        if attention is None:
            return []
        names = self.layout.cache_scale_names(self.plan.kv_cache, attention.key_module, attention.value_module)
        (scale,) = self.layout.stored("fp8", {"k_scale": torch.ones(())}).values()
        return [(name, tuple(scale.shape)) for name in names]


_PROBE = 32
"""Inputs of the weight that shows how a format is stored: a block of each."""


def _stored_shapes(chosen: LinearFormat, layout: CheckpointLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) by ending of the tensors of a weight [1, _PROBE]."""
    assert _PROBE % FORMATS[chosen.weights].block == 0, chosen
    tensors = number_format(chosen.weights).quantize_weight(torch.zeros(1, _PROBE, dtype=EXPORT_DTYPE), torch.ones(()))
    if chosen.calibrates_inputs:
        tensors["input_scale"] = torch.ones(())
    return {name: (tuple(one.shape), one.dtype) for name, one in layout.stored(chosen.weights, tensors).items()}


def export_checkpoint(
    model: Model,
    plan: QuantizationPlan,
    output_dir: Path,
    *,
    model_dir: Path,
    layout: str = "modelopt",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[str]:
    """Write the model to ``output_dir``; the same bytes from any layout.

    Args:
        model: quantized by ``plan``, calibrated and switched on.
        plan: what is quantized, of the whole model.
        output_dir: must not hold anything but an earlier export; appears complete or stays as it was.
        model_dir: the original checkpoint, for tokenizer and generation files, and for the tensors that this model does
            not compute with, which are carried over.
        layout: a key of ``LAYOUTS``.
        max_file_bytes: weights per file.

    Returns:
        Names of the tensors that were carried over.

    Collectives: those of ``stream_tensors`` and flags over all ranks before anything is written.

    Raises:
        UserError: NaN or Inf in a weight, an input amax that is not positive and finite, or an occupied
            ``output_dir``; the same on every rank.
    """
    conversion = QuantizedConversion.of(model, plan, LAYOUTS[layout])
    _refuse_unfit(model)
    carried = carried_tensors(model.architecture, model_dir)
    manifest = Manifest()
    files = HfFiles(output_dir, model.ranks, manifest=MANIFEST_FILE)
    with files.writing() as folder:
        carry = read_carried(carried if model.ranks.is_main else {})
        stream = manifest.watch(chain(stream_tensors(model, conversion), carry))
        described = stored_tensors(model.architecture, conversion) + [
            Description(name, entry.dtype, entry.shape, entry.end - entry.begin) for name, entry in carried.items()
        ]
        files.write_tensors(folder, described, stream, max_file_bytes)
        for name, content in LAYOUTS[layout].config_files(model.architecture, plan).items():
            files.write_json(folder, name, content)
        files.copy_side_files(folder, model_dir)
        if model.ranks.is_main:
            files.write_json(folder, MANIFEST_FILE, manifest.content(sorted(folder.iterdir()), plan.note))
    return list(carried)


@torch.no_grad()
def _refuse_unfit(model: Model) -> None:
    """Look at every weight and scale on every rank and fail together, before anything is written."""
    problem: str | None = None
    for held in model.held:
        shards = held.weight.take(held.data, *held.ranks)
        for part, shard in zip(held.weight.parts, shards, strict=True):
            problem = problem or _not_finite(part, shard.to(EXPORT_DTYPE))
    for site in [*weight_sites(model), *cache_sites(model)]:
        for one in site.observed():
            for name, amax in zip(one.names, one.amax.reshape(-1).tolist(), strict=True):
                if problem is None and not 0.0 < amax < float("inf"):
                    problem = f"{name} has a largest calibrated {one.what} of {amax}; calibrate the model before export"
    raise_together(None if problem is None else f"export refused: {problem}")


def _not_finite(part: HfTensor, shard: Tensor) -> str | None:
    if bool(torch.isfinite(tensor_amax(shard))):
        return None
    nan, inf = int(shard.isnan().sum()), int(shard.isinf().sum())
    return f"{part.name} holds {nan} NaN and {inf} Inf values on one rank; go back to an earlier checkpoint"
