"""What every quantized layer has, a parallel linear or the output head: an input and a weight quantizer.

A layer is in one of three modes (``QuantizerMode``). In calibration it looks at its inputs; switched on, it multiplies
a quantized copy of its weight, made once per optimizer step, with inputs rounded at every forward. Its inputs' scale is
calibrated or each token's own; its weight's follows from the weight as it is, by the method that the recipe names.
"""

from dataclasses import replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.rows import LinearSite
from megaqad.nvfp4 import choose_scales, dequantize, quantize, row_amax, tensor_amax
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.numbers import EXPORT_DTYPE, number_format
from megaqad.quantization.scales import DEFAULT_SCALING, Scaling, count_magnitudes


class QuantizerMode(Enum):
    """What the quantizers of a layer do in forward."""

    OFF = "off"  # the BF16 layer
    CALIBRATE = "calibrate"  # the BF16 layer, recording the largest input
    ON = "on"  # the NVFP4 layer


class Quantizers(torch.nn.Module):
    """Mixed in before the layer itself, which calls ``set_up`` once it has its weight.

    Attributes:
        site: which layer this is, with its Hugging Face module names.
        quantization: its formats.
        input_amax: float32 [], largest absolute input seen in calibration; 0 until then. Part of the state dict,
            identical on all tensor- and data-parallel ranks. Stays 0 where inputs have no scale from calibration.
        input_counts: while it calibrates a percentile, how often each magnitude was seen (``count_magnitudes``).
        mode: what forward does with the quantizers.
    """

    site: LinearSite
    quantization: LinearFormat
    mode: QuantizerMode
    input_amax: Tensor
    input_counts: Tensor | None

    def set_up(self, site: LinearSite, quantization: LinearFormat, scaling: Scaling) -> None:
        """Quantizers off, nothing calibrated."""
        self.site = site
        self.quantization = quantization
        self._scaling = scaling
        self.mode = QuantizerMode.OFF
        self.input_counts = None
        self.register_buffer("input_amax", torch.zeros((), dtype=torch.float32, device=self.current_weight().device))
        self._quantized_weight: Tensor | None = None
        self._scales: tuple[Tensor, Tensor | None] | None = None

    def current_weight(self) -> Tensor:
        """The trained weight, this rank's shard [N, K], in its own dtype; asked every time, since DDP moves parameters
        into buffers of its own."""
        raise NotImplementedError

    @property
    def input_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the parts of one token's input; None when this rank holds all of it."""
        return None

    @property
    def scaling(self) -> Scaling:
        """How scales come about; those of weights are chosen in NVFP4 only."""
        if self.quantization.weights == "nvfp4":
            return self._scaling
        return replace(DEFAULT_SCALING, activation_percentile=self._scaling.activation_percentile)

    def observe(self, x: Tensor) -> None:
        """Calibrate on an input of any shape: its largest magnitude and, for a percentile, how many it has of each.
        Nothing where inputs have no scale from calibration."""
        if not self.quantization.calibrates_inputs:
            return
        self.input_amax.copy_(torch.maximum(self.input_amax, tensor_amax(x.detach())))
        if self.scaling.activation_percentile < 100:
            counts = count_magnitudes(x)
            self.input_counts = counts if self.input_counts is None else self.input_counts + counts

    def amax_of(self, x: Tensor) -> Tensor:
        """What the scale of an input [.., K] comes from: float32 [], calibrated, or [.., 1], each token's own.

        Collective: dynamic and cut along K, one all-reduce (maximum) over ``input_group``.
        """
        if not self.quantization.dynamic:
            return self.input_amax
        amax = row_amax(x)
        group = self.input_group
        if group is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        return amax

    def export_weight(self) -> Tensor:
        """The weight as the checkpoint will hold it before quantization: BF16 [N, K], no gradient."""
        return self.current_weight().detach().to(EXPORT_DTYPE)

    def largest_weight(self) -> Tensor:
        """float32 []: largest absolute weight of this rank's shard; 0 where it is empty."""
        return tensor_amax(self.export_weight())

    @property
    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(amax float32 [], block_amax float32 [N, K / 16] or None for the blocks' own) of the quantized copy: what
        ``nvfp4.quantize`` makes the exported bytes with."""
        assert self._scales is not None, "refresh_weights() must run first"
        return self._scales

    def weight_scales(self, amax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scales of the coming quantized copy. ``amax``: as for ``set_quantized_weight``."""
        assert amax is not None, "only scales that are state need no amax"
        if self.scaling.calibration == "max":
            return amax, None
        return choose_scales(self.export_weight(), amax, self.scaling.calibration)

    @torch.no_grad()
    def set_quantized_weight(self, amax: Tensor | None) -> None:
        """Quantize the weight for the coming forwards. ``amax``: float32 [], the maximum over all shards; None where
        scales are state."""
        self._scales = chosen, block_amax = self.weight_scales(amax)
        weight = self.current_weight()
        if block_amax is None:
            self._quantized_weight = number_format(self.quantization.weights).round_weight(weight, chosen)
        else:
            packed = quantize(self.export_weight(), chosen, block_amax=block_amax)
            self._quantized_weight = dequantize(packed, weight.dtype)

    @property
    def quantized_weight(self) -> Tensor:
        """[N, K] in the weight's dtype: what forward multiplies with."""
        assert self._quantized_weight is not None, "refresh_weights() must run before a quantized forward"
        return self._quantized_weight
