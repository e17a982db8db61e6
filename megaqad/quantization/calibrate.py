"""Calibration: one look at data for the scales of inputs and of the KV cache, one at weights for scales that are state.

Every maximum and every count is over all ranks that hold a part of the tensor, so an FP32 run gives the same bytes in
any layout. In BF16 the activations themselves depend on the tensor-parallel size, whose partial sums are rounded: an
input scale can then be a step of BF16 away from that of one rank, which equals ModelOpt's. What is wrong on one rank is
said by all, so that none is left waiting.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.quantization.layers import QuantizedLinear, QuantizerMode
from megaqad.quantization.quantizers import Quantizers
from megaqad.quantization.scales import BINS, percentile_of
from megaqad.quantization.state import (
    cache_buffers,
    maximum_over,
    quantized_caches,
    quantized_linears,
    refresh_weights,
    set_mode,
)
from megaqad.runtime.agree import raise_together
from megaqad.runtime.parallel import ParallelContext


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
    one over the data-parallel group; flags over all ranks.

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
    reduced = maximum_over([amax for _, amax in found], [context.tensor_group, context.data_group])
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
    raise_together(_apply_percentiles(layers, context))
    _choose_scales([layer for layer in layers if isinstance(layer, QuantizedLinear)], context)
    refresh_weights(chunks, context)
    set_mode(chunks, QuantizerMode.ON)


def _refuse_unfit_weights(layers: Sequence[Quantizers], context: ParallelContext) -> None:
    """Collectives: one all-reduce (maximum) over the tensor-parallel group, one of a flag over all ranks."""
    amaxes = maximum_over([layer.largest_weight() for layer in layers], [context.tensor_group])
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
    return inputs + [(f"output at {name}", amax) for name, amax in cache_buffers(caches)]


def _apply_percentiles(layers: Sequence[Quantizers], context: ParallelContext) -> str | None:
    """Lower input amaxes to the percentile where the recipe asks for one; what is wrong with the first that becomes 0.
    Collectives: two sums of counts for each such layer."""
    problem = None
    for layer in layers:
        if not layer.quantization.calibrates_inputs or layer.scaling.activation_percentile == 100:
            continue
        counts, layer.input_counts = layer.input_counts, None
        if counts is None:  # this rank had no sequence to look at
            counts = torch.zeros(BINS, dtype=torch.int64, device=layer.input_amax.device)
        for group in (context.tensor_group, context.data_group):
            if group.size() > 1:
                dist.all_reduce(counts, group=group)
        percentile = layer.scaling.activation_percentile
        amax = percentile_of(counts, percentile)
        if problem is None and amax.item() == 0.0:
            problem = (
                f"quantization.activation_percentile={percentile} of the inputs of {layer.site.hf_modules[0]} is 0: "
                "use a higher one, at most 100"
            )
        layer.input_amax.copy_(amax)
    return problem


def _choose_scales(layers: Sequence[QuantizedLinear], context: ParallelContext) -> None:
    """Scales that are state. Collective: one all-reduce (maximum) over the tensor-parallel group."""
    stored = [layer for layer in layers if layer.scaling.stored]
    amaxes = maximum_over([layer.largest_weight() for layer in stored], [context.tensor_group])
    for layer, amax in zip(stored, amaxes, strict=True):
        layer.choose_scales(amax)


def _up_to_bfloat16(amax: Tensor) -> Tensor:
    """The next BF16 value at or above a positive float32 []; what is BF16 already stays.

    Sums differ in their last bits between layouts, and an FP32 run would carry that into the exported scales. On the
    BF16 grid every layout has the same scale, and nothing saturates that calibration saw.
    """
    return ((amax.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
