"""Which parts of a model quantization hurts: each layer group quantized alone, everything else in BF16.

The quantizers of a calibrated student can be switched layer by layer, to another format too (what calibration found
of the inputs holds for every format), so this needs no second model: one forward pass over some held-out tokens per
group and format. The teacher's hidden states are computed once (``Evaluator``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from megaqad.models.architecture import Architecture
from megaqad.models.model import Model
from megaqad.quantization.allocation import Group, GroupKL, groups_of
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.model import cache_sites, weight_sites
from megaqad.quantization.plan import QuantizationPlan
from megaqad.quantization.site import QuantizerMode


def quantized_groups(plan: QuantizationPlan, architecture: Architecture) -> list[Group]:
    """The groups that the recipe quantizes, in model order, the same on every rank."""
    tensors = architecture.tensors
    return groups_of(list(plan.formats), {name: torch.Size(tensors[f"{name}.weight"]).numel() for name in plan.formats})


def quantize_only(model: Model, modules: Collection[str], *, caches: bool) -> None:
    """Switch the quantizers of this rank's layers on where they hold one of ``modules``, off elsewhere.

    ``caches``: those of keys and values.
    """
    for cache in cache_sites(model):
        cache.mode = QuantizerMode.ON if caches else QuantizerMode.OFF
    for layer in weight_sites(model):
        layer.mode = QuantizerMode.ON if layer.module_names[0] in modules else QuantizerMode.OFF


def use_formats(model: Model, formats: Mapping[str, LinearFormat]) -> None:
    """Have this rank's layers compute in the format that their first module has in ``formats``, and quantize their
    weights in it; other layers are left. For emulated layers of a model that only measures: what a checkpoint or an
    export holds is for the recipe to say.

    Collective: that of ``refresh``.
    """
    for layer in weight_sites(model):
        layer.quantization = formats.get(layer.module_names[0], layer.quantization)
    quantize_only(model, formats, caches=True)
    model.changed()


def measure_groups(
    model: Model,
    groups: Sequence[Group],
    measure: Callable[[], float],
    *,
    plan: QuantizationPlan,
    others: Sequence[str] = (),
) -> list[GroupKL]:
    """KL of every group quantized alone; leaves everything quantized as ``plan`` says.

    Args:
        model: a student calibrated by ``plan``, its weights quantized.
        groups: the same on every rank.
        measure: held-out KL of ``model`` as it is, the same on every rank.
        others: formats to measure besides the recipe's own, by their names in ``CHOICES``.

    Collectives: those of ``measure``, once per group and format, and of ``use_formats`` per other format.
    """
    found = _measure_alone(model, groups, measure)
    other_kls: list[dict[str, float]] = [{} for _ in groups]
    for name in others:
        chosen = plan.named(name)
        assert chosen is not None, "BF16 needs no measuring"
        use_formats(model, dict.fromkeys(plan.formats, chosen))
        for kls, kl in zip(other_kls, _measure_alone(model, groups, measure), strict=True):
            kls[name] = kl
    if others:
        use_formats(model, plan.formats)
    quantize_only(model, plan.formats, caches=True)
    return [
        GroupKL(group.name, kl, group.weights, kls) for group, kl, kls in zip(groups, found, other_kls, strict=True)
    ]


def _measure_alone(model: Model, groups: Sequence[Group], measure: Callable[[], float]) -> list[float]:
    kls = []
    for group in groups:
        quantize_only(model, group.modules, caches=False)
        kls.append(measure())
    return kls
