"""Calibration: one look at data for the scales of inputs and of the KV cache, one at weights for scales that are state.

Every maximum and every count is over all ranks that hold a part of the tensor, so an FP32 run gives the same bytes in
any layout. In BF16 the activations themselves depend on the tensor-parallel size, whose partial sums are rounded: an
input scale can then be a step of BF16 away from that of one rank, which equals ModelOpt's. What is wrong on one rank is
reported by all, so that none is left waiting.

A site that saw nothing but zeros (a pruned module, an expert that no token reached) has no maximum. Engines want a
positive scale all the same: it takes the largest of its layer's experts, or 1, and is named.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.model import Model
from megaqad.quantization.model import largest_weights, maxima_over, sites, stored_scales, switch
from megaqad.quantization.scales import BINS, percentile_of
from megaqad.quantization.site import Observed, QuantizerMode
from megaqad.runtime.agree import gather_lists, raise_together

FALLBACK = 1.0
"""The maximum of a site that saw only zeros, and whose layer did."""


@torch.no_grad()
def calibrate(model: Model, run_forward: Callable[[], object] | None) -> list[str]:
    """Run data through the unquantized model and keep the largest absolute input, in BF16, of each site that needs it,
    or the percentile of all that the recipe asks for; then choose the weight scales that are state.

    Leaves the model in mode ON with its weights quantized.

    Args:
        run_forward: forwards the calibration batches through all pipeline stages of this rank; None when nothing is to
            be found in data (``QuantizationPlan.needs_data``).

    Returns:
        Modules that saw only zeros, in no model of more than one rank in model order; the same on every rank.

    Collectives: those of ``run_forward``, then one all-reduce (maximum) for each group of ranks over which inputs are
    observed; flags and lists of names over all ranks.

    Raises:
        UserError: a site that saw NaN or Inf; on every rank, and the message names it.
    """
    for site in sites(model):
        site.forget()
    switch(model, QuantizerMode.CALIBRATE)
    if run_forward is not None:
        run_forward()
    found = [one for site in sites(model) for one in site.observed()]
    reduced = maxima_over([one.amax for one in found], [one.groups for one in found])
    raise_together(_not_finite(found, reduced))
    reduced = [_with_percentile(one, amax) for one, amax in zip(found, reduced, strict=True)]
    silent = _fill_silent(found, reduced)
    for one, amax in zip(found, reduced, strict=True):
        one.amax.copy_(_up_to_bfloat16(amax))
    _choose_scales(model)
    switch(model, QuantizerMode.ON)
    return list(dict.fromkeys(gather_lists(silent)))


def _not_finite(found: Sequence[Observed], reduced: Sequence[Tensor]) -> str | None:
    """What is wrong with the first maximum that is no number."""
    for one, amax in zip(found, reduced, strict=True):
        for name, value in zip(one.names, amax.reshape(-1).tolist(), strict=True):
            if not value < float("inf"):
                return (
                    f"calibration found a largest {one.what} of {value} at {name}; the scale must be finite, check the "
                    "checkpoint and the calibration data"
                )
    return None


def _with_percentile(one: Observed, amax: Tensor) -> Tensor:
    """The maximum, or the percentile where the recipe asks for one; a percentile of 0 is no scale, then the maximum.
    Collectives: a sum of counts for each of its groups."""
    if one.percentile == 100:
        return amax
    counts = one.counts
    if counts is None:  # this rank had no sequence to look at
        counts = torch.zeros(BINS, dtype=torch.int64, device=amax.device)
    for group in one.groups:
        if group.size() > 1:
            dist.all_reduce(counts, group=group)
    found = percentile_of(counts, one.percentile) if counts.any() else amax
    return torch.where(found > 0, found, amax)


def _fill_silent(found: Sequence[Observed], reduced: list[Tensor]) -> list[str]:
    """Give sites that saw only zeros a scale, in place; their names. Collectives: ``maxima_over`` of the layers."""
    layers = maxima_over([amax.amax().reshape(1) for amax in reduced], [one.layer_groups for one in found])
    silent = []
    for index, (one, amax) in enumerate(zip(found, reduced, strict=True)):
        zero = amax == 0
        silent += [name for name, none in zip(one.names, zero.reshape(-1).tolist(), strict=True) if none]
        of_layer = torch.where(layers[index] > 0, layers[index], FALLBACK).reshape(())
        reduced[index] = of_layer.expand_as(amax) if one.shared else torch.where(zero, of_layer, amax)
    return silent


def _choose_scales(model: Model) -> None:
    """Scales that are state. Collective: one all-reduce (maximum) over the ranks that divide the weights."""
    stored = list(stored_scales(model))
    for layer, amax in zip(stored, largest_weights(stored), strict=True):
        layer.choose_scales(amax)


def _up_to_bfloat16(amax: Tensor) -> Tensor:
    """The next BF16 value at or above positive float32 numbers; what is BF16 already stays.

    Sums differ in their last bits between layouts, and an FP32 run would carry that into the exported scales. On the
    BF16 grid every layout has the same scale, and nothing saturates that calibration saw.
    """
    return ((amax.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
