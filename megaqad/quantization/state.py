"""The quantizers of a whole model: built, refreshed and measured together (``calibrate.py`` gives them their scales).

Every scale is a maximum over all ranks that hold a part of the tensor, so a model gives the same bytes in any layout.
The maxima of all layers travel in one all-reduce, not one per layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megaqad.models.build import LinearChoice
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.modules import CausalAttention, QuantizerParameter
from megaqad.models.rows import LinearSite, head_site
from megaqad.nvfp4.calibration import Method
from megaqad.quantization.attention import QuantizedCausalAttention
from megaqad.quantization.head import HeadQuantizer
from megaqad.quantization.layers import (
    EXPORT_DTYPE,
    NVFP4ColumnParallelLinear,
    NVFP4RowParallelLinear,
    QuantizerMode,
)
from megaqad.quantization.quantizers import Quantizers
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.scales import Scaling
from megaqad.runtime.parallel import ParallelContext


def linear_for(recipe: Recipe, backend: str | None = None) -> LinearChoice:
    """The function by which ``build_model`` asks which layer to put at a site.

    ``backend`` stands in for the recipe's own.
    """
    if (backend or recipe.settings.backend) == "transformer_engine":
        from megaqad.quantization.transformer_engine import transformer_engine_layers

        layers: Mapping[str, type] = transformer_engine_layers()
    else:
        layers = {"column": NVFP4ColumnParallelLinear, "row": NVFP4RowParallelLinear}

    scaling = _scaling_of(recipe)

    def choose(site: LinearSite) -> type | ModuleSpec:
        quantization = recipe.format_of(site.hf_modules)
        if quantization is None:
            return ColumnParallelLinear if site.parallel == "column" else RowParallelLinear
        return ModuleSpec(
            module=layers[site.parallel], params={"site": site, "quantization": quantization, "scaling": scaling}
        )

    return choose


def _scaling_of(recipe: Recipe) -> Scaling:
    settings = recipe.settings
    return Scaling(
        calibration=cast(Method, settings.calibration),
        weight_scales=settings.weight_scales,
        activation_percentile=settings.activation_percentile,
    )


class QuantizedModules(TypedDict):
    """What ``build_model`` and ``copy_model`` take to build a quantized model."""

    linear_for: LinearChoice
    attention_core: type | ModuleSpec
    prepare: Callable[[CausalLM], None]


def modules_for(recipe: Recipe, description: ModelDescription, backend: str | None = None) -> QuantizedModules:
    """The modules of a model quantized by ``recipe``: its linear layers, its attention, its head.

    ``backend`` stands in for the recipe's own.
    """
    attention: type | ModuleSpec = CausalAttention
    if recipe.kv_cache != "none":
        attention = ModuleSpec(module=QuantizedCausalAttention, params={"kv_format": recipe.kv_cache})

    def prepare(chunk: CausalLM) -> None:
        for layer in chunk.decoder.layers:
            core = layer.self_attention.core_attention
            if isinstance(core, QuantizedCausalAttention):
                core.layer = layer.layer_number - 1
                core.rounds = recipe.rounds_activations
        site = head_site(description)
        quantization = recipe.format_of(site.hf_modules)
        if chunk.post_process and quantization is not None:
            chunk.head_quantizer = HeadQuantizer(chunk.original_head, site, quantization, _scaling_of(recipe))

    return QuantizedModules(linear_for=linear_for(recipe, backend), attention_core=attention, prepare=prepare)


def quantized_linears(chunks: Sequence[torch.nn.Module]) -> Iterator[Quantizers]:
    """The quantized layers on this rank, in model order; the head is the last."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Quantizers):
                yield module


def quantized_caches(chunks: Sequence[torch.nn.Module]) -> Iterator[QuantizedCausalAttention]:
    """The attentions on this rank that round keys and values, in model order."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, QuantizedCausalAttention):
                yield module


def set_mode(chunks: Sequence[torch.nn.Module], mode: QuantizerMode) -> None:
    """Put every quantized layer of this rank into ``mode``."""
    for layer in quantized_linears(chunks):
        layer.mode = mode
    for cache in quantized_caches(chunks):
        cache.mode = mode


def maximum_over(values: list[Tensor], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """Element-wise maximum of float32 [] values over ``groups``: one all-reduce per group of more than one rank."""
    if not values:
        return []
    stacked = torch.stack(values)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(stacked, op=dist.ReduceOp.MAX, group=group)
    return list(stacked.unbind())


@torch.no_grad()
def refresh_weights(chunks: Sequence[torch.nn.Module], context: ParallelContext) -> None:
    """Quantize every weight for the coming forwards; call after loading and after each optimizer step.

    Collective: one all-reduce (maximum) over the tensor-parallel group, if the scales of any layer follow its weight.
    """
    layers = list(quantized_linears(chunks))
    following = [layer for layer in layers if not layer.scaling.stored]
    amaxes = maximum_over([layer.largest_weight() for layer in following], [context.tensor_group])
    found = dict(zip(following, amaxes, strict=True))
    for layer in layers:
        layer.set_quantized_weight(found.get(layer))


@torch.no_grad()
def round_to_export_dtype(chunks: Sequence[torch.nn.Module]) -> None:
    """Round every parameter to the dtype of the exported checkpoint, in place; nothing changes in a BF16 run."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not isinstance(parameter, QuantizerParameter):  # scales are exported as they are
                parameter.copy_(parameter.to(EXPORT_DTYPE))


def cache_amaxes(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Largest key by ``k_proj`` module name and value by ``v_proj``'s, for the layers on this rank."""
    return {name: amax.item() for name, amax in cache_buffers(quantized_caches(chunks))}


def cache_buffers(caches: Iterable[QuantizedCausalAttention]) -> Iterator[tuple[str, Tensor]]:
    """(module whose outputs it is of, float32 [] buffer) of every largest key and value."""
    for cache in caches:
        yield from zip(cache.hf_modules, (cache.key_amax, cache.value_amax), strict=True)


def weight_scales(chunks: Sequence[torch.nn.Module]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What each quantized layer's copy was quantized with (``scales``), by its first Hugging Face module."""
    return {layer.site.hf_modules[0]: layer.scales for layer in quantized_linears(chunks)}


def input_amaxes(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Calibrated input amax by Hugging Face module name, for the layers on this rank; 0 where none is."""
    return {name: layer.input_amax.item() for layer in quantized_linears(chunks) for name in layer.site.hf_modules}


@dataclass(frozen=True)
class LayerError:
    """What quantization does to one layer's weight."""

    module: str
    """Hugging Face module names, joined by a comma where one GEMM holds several."""
    relative_error: float
    """Frobenius norm of (quantized - weight) over that of the weight."""
    bits: float
    """Bits per weight, block scales included."""


@torch.no_grad()
def quantization_errors(chunks: Sequence[torch.nn.Module], context: ParallelContext) -> list[LayerError]:
    """Weight error of every quantized layer of the model, in model order, the same on all ranks.

    Collectives: one sum over the tensor-parallel group, one object gather over the pipeline group.
    """
    layers = list(quantized_linears(chunks))
    local: list[LayerError] = []
    if layers:
        sums = torch.stack(
            [
                torch.stack(
                    [
                        (layer.quantized_weight.double() - layer.export_weight().double()).square().sum(),
                        layer.export_weight().double().square().sum(),
                    ]
                )
                for layer in layers
            ]
        )  # [layers, 2]
        dist.all_reduce(sums, group=context.tensor_group)
        errors = (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()
        local = [
            LayerError(", ".join(layer.site.hf_modules), error, layer.quantization.facts.bits)
            for layer, error in zip(layers, errors, strict=True)
        ]
    keyed = [(layer.site.layer, error) for layer, error in zip(layers, local, strict=True)]
    gathered: list[list[tuple[int, LayerError]]] = [[] for _ in range(context.sizes.pipeline)]
    dist.all_gather_object(gathered, keyed, group=context.pipeline_group)
    by_layer = sorted((row for rows in gathered for row in rows), key=lambda row: row[0])  # stable within a layer
    return [error for _, error in by_layer]
