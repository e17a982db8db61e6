"""The quantizers of a whole model: calibrated together, refreshed together, measured together.

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

from megaqad.errors import UserError
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
    QuantizedLinear,
    QuantizerMode,
)
from megaqad.quantization.quantizers import Quantizers
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.scales import Scaling, percentile_of
from megaqad.runtime.agree import raise_together
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


def _maximum(values: list[Tensor], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
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
    amaxes = _maximum([layer.largest_weight() for layer in following], [context.tensor_group])
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


@torch.no_grad()
def calibrate(
    chunks: Sequence[torch.nn.Module], context: ParallelContext, run_forward: Callable[[], object] | None
) -> None:
    """Run data through the unquantized model and keep the largest absolute input, in BF16, of each layer that needs it,
    or the percentile of all that the recipe asks for; then choose the weight scales that are state.

    Leaves the model in mode ON with its weights quantized.

    Args:
        run_forward: forwards the calibration batches through all pipeline stages of this rank; None when nothing is to
            be found in data (``Recipe.needs_data``).

    Collectives: one all-reduce (maximum) over the tensor-parallel group, those of ``run_forward``, then another over
    the tensor-parallel group, which under sequence parallelism and in row-parallel layers holds different inputs, and
    one over the data-parallel group; two flags over all ranks.

    Raises:
        UserError: a weight that holds NaN or Inf; a layer that saw no input, only zeros, NaN or Inf; on every rank, and
            the message names it.
    """
    layers = list(quantized_linears(chunks))
    _refuse_unfit_weights(layers, context)
    set_mode(chunks, QuantizerMode.CALIBRATE)
    found = calibrated(chunks)
    for _, amax in found:
        amax.zero_()
    for layer in layers:
        layer.input_counts = None
    if run_forward is not None:
        run_forward()
    reduced = _maximum([amax for _, amax in found], [context.tensor_group, context.data_group])
    problem = None
    for (what, buffer), amax in zip(found, reduced, strict=True):
        value = amax.item()
        if problem is None and not 0.0 < value < float("inf"):
            problem = (
                f"calibration found a largest {what} of {value}; the scale must be positive and finite, check the "
                "checkpoint and the calibration data"
            )
        buffer.copy_(_up_to_bfloat16(amax))
    raise_together(problem)
    for layer in layers:
        _apply_percentile(layer, context)
    _choose_scales([layer for layer in layers if isinstance(layer, QuantizedLinear)], context)
    refresh_weights(chunks, context)
    set_mode(chunks, QuantizerMode.ON)


def _refuse_unfit_weights(layers: Sequence[Quantizers], context: ParallelContext) -> None:
    """Collectives: one all-reduce (maximum) over the tensor-parallel group, one of a flag over all ranks."""
    amaxes = _maximum([layer.largest_weight() for layer in layers], [context.tensor_group])
    problem = None
    for layer, amax in zip(layers, amaxes, strict=True):
        if problem is None and not bool(torch.isfinite(amax)):
            modules = layer.site.hf_modules
            which = f"{modules[0]}.weight" if len(modules) == 1 else f"the weight of one of {', '.join(modules)}"
            number = layer.quantization.weights
            problem = f"{which} holds NaN or Inf, which {number} cannot represent: repair the checkpoint"
    raise_together(problem)


def calibrated(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, Tensor]]:
    """What each calibrated maximum on this rank is of, in words, and the float32 [] buffer that holds it."""
    inputs = [
        (f"input at {layer.site.hf_modules[0]}", layer.input_amax)
        for layer in quantized_linears(chunks)
        if layer.quantization.calibrates_inputs
    ]
    caches = [cache for cache in quantized_caches(chunks) if cache.calibrates]
    return inputs + [(f"output at {name}", amax) for name, amax in _cache_buffers(caches)]


def cache_amaxes(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Largest key by ``k_proj`` module name and value by ``v_proj``'s, for the layers on this rank."""
    return {name: amax.item() for name, amax in _cache_buffers(quantized_caches(chunks))}


def _cache_buffers(caches: Iterable[QuantizedCausalAttention]) -> Iterator[tuple[str, Tensor]]:
    """(module whose outputs it is of, float32 [] buffer) of every largest key and value."""
    for cache in caches:
        yield from zip(cache.hf_modules, (cache.key_amax, cache.value_amax), strict=True)


def _apply_percentile(layer: Quantizers, context: ParallelContext) -> None:
    """Lower the input amax to the percentile. Collectives: two sums of counts where a layer has them."""
    if layer.input_counts is None:
        return
    counts, layer.input_counts = layer.input_counts, None
    for group in (context.tensor_group, context.data_group):
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
    percentile = layer.scaling.activation_percentile
    amax = percentile_of(counts, percentile)
    if amax.item() == 0.0:
        raise UserError(
            f"quantization.activation_percentile={percentile} of the inputs of {layer.site.hf_modules[0]} is 0: use a "
            "higher one, at most 100"
        )
    layer.input_amax.copy_(amax)


def _choose_scales(layers: Sequence[QuantizedLinear], context: ParallelContext) -> None:
    """Scales that are state. Collective: one all-reduce (maximum) over the tensor-parallel group."""
    stored = [layer for layer in layers if layer.scaling.stored]
    amaxes = _maximum([layer.largest_weight() for layer in stored], [context.tensor_group])
    for layer, amax in zip(stored, amaxes, strict=True):
        layer.choose_scales(amax)


def weight_scales(chunks: Sequence[torch.nn.Module]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What each quantized layer's copy was quantized with (``scales``), by its first Hugging Face module."""
    return {layer.site.hf_modules[0]: layer.scales for layer in quantized_linears(chunks)}


def input_amaxes(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Calibrated input amax by Hugging Face module name, for the layers on this rank; 0 where none is."""
    return {name: layer.input_amax.item() for layer in quantized_linears(chunks) for name in layer.site.hf_modules}


def _up_to_bfloat16(amax: Tensor) -> Tensor:
    """The next BF16 value at or above a positive float32 []; what is BF16 already stays.

    Sums differ in their last bits between layouts, and an FP32 run would carry that into the exported scales. On the
    BF16 grid every layout has the same scale, and nothing saturates that calibration saw.
    """
    return ((amax.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


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
