"""Which parts of a model quantization hurts: each layer group quantized alone, everything else in BF16.

The quantizers of a calibrated student can be switched layer by layer, to another format too (what calibration found
of the inputs holds for every format), so this needs no second model: one forward pass over some held-out tokens per
group and format. The teacher's hidden states are computed once (``Evaluator``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from megaqad.models.description import ModelDescription
from megaqad.models.rows import hf_tensors
from megaqad.quantization.allocation import Group, GroupKL, groups_of
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.state import quantized_caches, quantized_linears, refresh_weights
from megaqad.runtime.parallel import ParallelContext


def quantized_groups(recipe: Recipe, description: ModelDescription) -> list[Group]:
    """The groups that the recipe quantizes, in model order, the same on every rank."""
    tensors = hf_tensors(description)
    modules = recipe.quantized_modules()
    return groups_of(modules, {module: torch.Size(tensors[f"{module}.weight"]).numel() for module in modules})


def quantize_only(chunks: Sequence[torch.nn.Module], modules: Collection[str], *, caches: bool) -> None:
    """Switch the quantizers of this rank's layers on where they hold one of ``modules``, off elsewhere.

    ``caches``: those of keys and values.
    """
    for attention in quantized_caches(chunks):
        attention.mode = QuantizerMode.ON if caches else QuantizerMode.OFF
    for layer in quantized_linears(chunks):
        layer.mode = QuantizerMode.ON if layer.site.hf_modules[0] in modules else QuantizerMode.OFF


def use_formats(
    chunks: Sequence[torch.nn.Module], context: ParallelContext, formats: Mapping[str, LinearFormat]
) -> None:
    """Have this rank's layers compute in the format that their first module has in ``formats``, and quantize their
    weights in it; other layers are left. For emulated layers of a model that only measures: what a checkpoint or an
    export holds is for the recipe to say.

    Collective: that of ``refresh_weights``.
    """
    for layer in quantized_linears(chunks):
        layer.quantization = formats.get(layer.site.hf_modules[0], layer.quantization)
    refresh_weights(chunks, context)


def measure_groups(
    chunks: Sequence[torch.nn.Module],
    groups: Sequence[Group],
    measure: Callable[[], float],
    *,
    context: ParallelContext,
    recipe: Recipe,
    others: Sequence[str] = (),
) -> list[GroupKL]:
    """KL of every group quantized alone; leaves everything quantized as ``recipe`` says.

    Args:
        chunks: this rank's chunks of a student calibrated by ``recipe``, its weights quantized.
        groups: the same on every rank.
        measure: held-out KL of ``chunks`` as they are, the same on every rank.
        others: formats to measure besides the recipe's own, by their names in ``CHOICES``.

    Collectives: those of ``measure``, once per group and format, and of ``use_formats`` per other format.
    """
    found = _measure_alone(chunks, groups, measure)
    other_kls: list[dict[str, float]] = [{} for _ in groups]
    for name in others:
        chosen = recipe.named(name)
        assert chosen is not None, "BF16 needs no measuring"
        use_formats(chunks, context, dict.fromkeys(recipe.formats, chosen))
        for kls, kl in zip(other_kls, _measure_alone(chunks, groups, measure), strict=True):
            kls[name] = kl
    if others:
        use_formats(chunks, context, recipe.formats)
    quantize_only(chunks, recipe.formats, caches=True)
    return [
        GroupKL(group.name, kl, group.weights, kls) for group, kl, kls in zip(groups, found, other_kls, strict=True)
    ]


def _measure_alone(
    chunks: Sequence[torch.nn.Module], groups: Sequence[Group], measure: Callable[[], float]
) -> list[float]:
    kls = []
    for group in groups:
        quantize_only(chunks, group.modules, caches=False)
        kls.append(measure())
    return kls
