"""A whole quantized model: built by a plan, its weights kept quantized, its sites switched and measured together.

Every scale is a maximum over all ranks that hold a part of the tensor, so a model gives the same bytes in any layout.
The maxima of all sites travel in one all-reduce per group of ranks, not one per site. ``calibrate.py`` finds the scales
of inputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megaqad.models.architecture import Architecture
from megaqad.models.blocks.block import Builder
from megaqad.models.blocks.grouped import GroupedLinear
from megaqad.models.build import build_model, copy_model
from megaqad.models.causal_lm import CausalLM
from megaqad.models.model import Model, QuantizerParameter
from megaqad.models.weights import Weight
from megaqad.quantization.experts import QuantizedExperts
from megaqad.quantization.head import HeadSite
from megaqad.quantization.layers import NVFP4ColumnParallelLinear, NVFP4RowParallelLinear, QuantizedLinear
from megaqad.quantization.numbers import EXPORT_DTYPE
from megaqad.quantization.plan import QuantizationPlan
from megaqad.quantization.site import CacheSite, QuantizerMode, Site, WeightSite
from megaqad.runtime.ranks import Ranks


@dataclass(frozen=True)
class QuantizedChoices:
    """The modules of a model quantized by ``plan``; a ``Choices`` of ``models.blocks``."""

    plan: QuantizationPlan
    ranks: Ranks
    backend: str

    @property
    def observes(self) -> tuple[dist.ProcessGroup, ...]:
        """Over which inputs' maxima are taken: tensor-parallel ranks have other parts of them, data-parallel ranks
        other data."""
        return (self.ranks.tensor_group, self.ranks.data_group)

    def linear(self, weight: Weight) -> type | ModuleSpec:
        chosen = self.plan.format_of(weight)
        if chosen is None:
            return RowParallelLinear if weight.row_parallel else ColumnParallelLinear
        scaling = self.plan.scaling
        params = {"held": weight, "quantization": chosen, "scaling": scaling, "observes": self.observes}
        return ModuleSpec(module=self._layers()["row" if weight.row_parallel else "column"], params=params)

    def _layers(self) -> dict[str, type]:
        if self.backend == "transformer_engine":
            from megaqad.quantization.transformer_engine import transformer_engine_layers

            return dict(transformer_engine_layers())
        return {"column": NVFP4ColumnParallelLinear, "row": NVFP4RowParallelLinear}

    def experts(self, weights: Sequence[Weight], builder: Builder) -> nn.Module:
        chosen = self.plan.format_of(weights[0])
        if chosen is None:
            return GroupedLinear(weights, builder)
        ranks = self.ranks
        return QuantizedExperts(
            weights,
            builder,
            chosen,
            self.plan.scaling,
            observes=(ranks.tensor_group, ranks.expert_data_group),
            siblings=(ranks.expert_group,),
        )

    def cache(self, key: str, value: str) -> nn.Module | None:
        if self.plan.kv_cache == "none":
            return None
        rounds = self.plan.rounds_activations
        return CacheSite(key, value, self.plan.kv_cache, rounds=rounds, observes=self.observes)

    def head(self, chunk: CausalLM, weight: Weight) -> HeadSite | None:
        """What rounds the head and its inputs."""
        chosen = self.plan.format_of(weight)
        if chosen is None:
            return None
        group = self.ranks.tensor_group
        return HeadSite(chunk.original_head, weight, chosen, self.plan.scaling, observes=self.observes, divides=group)


def build_quantized(
    architecture: Architecture,
    ranks: Ranks,
    plan: QuantizationPlan,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    initialize: bool = False,
    fused: str = "auto",
) -> Model:
    """A model with the sites of ``plan``, quantizers off. Arguments and collectives as of ``build_model``."""
    choices = QuantizedChoices(plan, ranks, plan.settings.backend)
    weight = architecture.head_weight
    model = build_model(
        architecture,
        ranks,
        dtype=dtype,
        choices=choices,
        head=lambda chunk: choices.head(chunk, weight),
        recompute=recompute,
        initialize=initialize,
        fused=fused,
    )
    return replace(model, on_change=refresh)


def copy_quantized(model: Model, plan: QuantizationPlan, *, dtype: torch.dtype) -> Model:
    """A copy of a quantized model that computes in ``dtype``, emulated, and rounds as ``plan`` says; forward only.

    ``plan`` must choose the same modules as the model's own; it may leave activations alone.
    """
    choices = QuantizedChoices(plan, model.ranks, "emulated")
    weight = model.architecture.head_weight
    copied = copy_model(model, dtype=dtype, choices=choices, head=lambda chunk: choices.head(chunk, weight))
    copied = replace(copied, on_change=refresh)
    switch(copied, QuantizerMode.ON)
    return copied


def sites(model: Model) -> Iterator[Site]:
    """The sites on this rank, in model order; the head is the last."""
    for chunk in model.chunks:
        for module in chunk.modules():
            if isinstance(module, Site):
                yield module


def weight_sites(model: Model) -> list[WeightSite]:
    """The quantized layers on this rank, in model order; the head is the last."""
    return [site for site in sites(model) if isinstance(site, WeightSite)]


def cache_sites(model: Model) -> list[CacheSite]:
    """The quantized KV caches on this rank, in model order."""
    return [site for site in sites(model) if isinstance(site, CacheSite)]


def switch(model: Model, mode: QuantizerMode) -> None:
    """Put every site of this rank into ``mode``; what is switched on has its weights quantized as they are now.

    Collective: switching on, that of ``refresh``.
    """
    for site in sites(model):
        site.mode = mode
    refresh(model)


def maxima_over(values: Sequence[Tensor], groups: Sequence[tuple[dist.ProcessGroup, ...]]) -> list[Tensor]:
    """Element-wise maximum of each float32 [n] over its groups of ranks: one all-reduce per group for all of them.

    Every rank of a group must call it with values of the same sizes.
    """
    reduced = list(values)
    for group in dict.fromkeys(group for several in groups for group in several):
        mine = [index for index, several in enumerate(groups) if group in several]
        if group.size() == 1:
            continue
        joined = torch.cat([reduced[index].reshape(-1) for index in mine])
        dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
        parts = joined.split([reduced[index].numel() for index in mine])
        for index, part in zip(mine, parts, strict=True):
            reduced[index] = part.view_as(reduced[index])
    return reduced


def largest_weights(layers: Sequence[WeightSite]) -> list[Tensor]:
    """float32 [n] of each: the largest absolute value of its weights over all shards. Collective: ``maxima_over``."""
    return maxima_over([layer.largest_weights() for layer in layers], [(layer.divides,) for layer in layers])


@torch.no_grad()
def refresh(model: Model) -> None:
    """Quantize the weights of every layer that is switched on, for the coming forwards.

    Whatever changes weights does it through ``Model.changed``: loading them, a checkpoint, an optimizer step.

    Collective: one all-reduce (maximum) over the ranks that divide the weights.
    """
    layers = [layer for layer in weight_sites(model) if layer.mode is QuantizerMode.ON]
    following = [layer for layer in layers if not layer.scaling.stored]
    amaxes = dict(zip(following, largest_weights(following), strict=True))
    for layer in layers:
        layer.refresh(amaxes.get(layer))


@torch.no_grad()
def round_to_export_dtype(model: Model) -> None:
    """Round every parameter to the dtype of the exported checkpoint, in place; nothing changes in a BF16 run."""
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            if not isinstance(parameter, QuantizerParameter):  # scales are exported as they are
                parameter.copy_(parameter.to(EXPORT_DTYPE))
    model.changed()


def input_amaxes(model: Model) -> dict[str, float]:
    """Calibrated input amax by Hugging Face module name, for the layers on this rank; 0 where none is."""
    found: dict[str, float] = {}
    for layer in weight_sites(model):
        for weight, amax in zip(layer.weights, layer.input_amax.reshape(-1).tolist(), strict=True):
            found |= dict.fromkeys(weight.modules, amax)
    return found


def cache_amaxes(model: Model) -> dict[str, float]:
    """Largest key by ``k_proj`` module name and value by ``v_proj``'s, for the layers on this rank."""
    return {
        name: amax.item()
        for site in cache_sites(model)
        for name, amax in zip(site.names, (site.key_amax, site.value_amax), strict=True)
    }


@dataclass(frozen=True)
class WeightError:
    """What quantization does to one layer's weight."""

    module: str
    """Hugging Face module names, joined by a comma where one GEMM holds several."""
    relative_error: float
    """Frobenius norm of (quantized - weight) over that of the weight."""
    bits: float
    """Bits per weight, block scales included."""


@torch.no_grad()
def quantization_errors(model: Model) -> list[WeightError]:
    """Weight error of every quantized layer of the model, in model order, the same on all ranks.

    Collectives: one sum over the ranks that divide the weights, one object gather over the pipeline group.
    """
    layers, ranks = weight_sites(model), model.ranks
    local: list[tuple[int, WeightError]] = []
    if layers:
        sums = torch.stack([layer.squared_errors() for layer in layers])  # [layers, 2]
        dist.all_reduce(sums, group=ranks.tensor_group)
        for layer, one in zip(layers, sums, strict=True):
            if layer.weights[0].expert is not None:
                dist.all_reduce(one, group=ranks.expert_group)
        errors = (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()
        for layer, error in zip(layers, errors, strict=True):
            index = layer.weights[0].layer
            place = model.architecture.num_layers if index is None else index
            local.append((place, WeightError(layer.title, error, layer.quantization.facts.bits)))
    gathered: list[list[tuple[int, WeightError]]] = [[] for _ in range(ranks.sizes.pipeline)]
    dist.all_gather_object(gathered, local, group=ranks.pipeline_group)
    by_layer = sorted((row for rows in gathered for row in rows), key=lambda row: row[0])  # stable within a layer
    return [error for _, error in by_layer]


def stored_scales(model: Model) -> Iterable[QuantizedLinear]:
    """The layers on this rank whose weight scales are state."""
    return (layer for layer in weight_sites(model) if isinstance(layer, QuantizedLinear) and layer.scaling.stored)
