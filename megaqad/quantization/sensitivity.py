"""Which parts of a model quantization hurts: each layer group quantized alone, everything else in BF16.

The quantizers of a calibrated student can be switched layer by layer, so this needs no second model: one forward pass
over some held-out tokens per group. The teacher's hidden states are computed once (``Evaluator``).
"""

from collections.abc import Callable, Collection, Sequence

import torch

from megaqad.models.description import ModelDescription
from megaqad.models.families import hf_tensors
from megaqad.quantization.allocation import Group, GroupKL, groups_of
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.state import quantized_caches, quantized_linears


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


def measure_groups(
    chunks: Sequence[torch.nn.Module], groups: Sequence[Group], measure: Callable[[], float]
) -> list[GroupKL]:
    """KL of every group quantized alone; leaves everything quantized.

    Args:
        chunks: this rank's chunks of a calibrated student, its weights quantized.
        groups: the same on every rank.
        measure: held-out KL of ``chunks`` as they are, the same on every rank.

    Collectives: those of ``measure``, once per group.
    """
    found = []
    for group in groups:
        quantize_only(chunks, group.modules, caches=False)
        found.append(GroupKL(group.name, measure(), group.weights))
    quantize_only(chunks, {module for group in groups for module in group.modules}, caches=True)
    return found
