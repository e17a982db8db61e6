"""Quantized linear layers, emulated: Megatron-Core's parallel layers computing on fake-quantized operands.

Forward, with W and X as a real NVFP4 GEMM would see them (or one in another format of ``numbers.py``)::

    Y = round_input(X, input_amax) @ round_weight(W, weight_amax)^T

Backward is straight-through (QAD, arXiv 2601.20088): gradients are those of the GEMM on the fake-quantized operands,
handed unchanged to X and W, in high precision. Everything parallel (sequence-parallel gather, input-gradient
all-reduce, output reduce) stays Megatron-Core's: only the operands of ``_forward_impl`` are replaced.

Scales. The input scale is static, from calibration, and shared by all ranks and by the modules fused in this layer.
The weight scale follows the weight as it trains: ``state.refresh_weights`` quantizes every weight once per optimizer
step, not once per microbatch, and forward uses that copy. With sequence parallelism the input is quantized before it
is gathered: blocks lie along the hidden dim, so the values are the same and each rank does its share.

Weights are rounded to BF16, the dtype of the checkpoint, before they are quantized, also in FP32 runs: what is
trained is then exactly what is exported.
"""

from enum import Enum
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megaqad.models.families import LinearSite
from megaqad.nvfp4 import tensor_amax
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.numbers import EXPORT_DTYPE, number_format


class QuantizerMode(Enum):
    """What the quantizers of a layer do in forward."""

    OFF = "off"  # the BF16 layer
    CALIBRATE = "calibrate"  # the BF16 layer, recording the largest input
    ON = "on"  # the NVFP4 layer


class _StraightThrough(torch.autograd.Function):
    """Forward: stand the quantized copy in for the weight. Backward: its gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """The values of ``quantized`` with their gradient handed to ``weight``."""
    result: Tensor = _StraightThrough.apply(weight, quantized)
    return result


class QuantizedLinear(torch.nn.Module):
    """The quantizers of one parallel linear layer; mixed in before Megatron-Core's layer.

    Attributes:
        site: which layer this is, with its Hugging Face module names.
        quantization: its formats.
        input_amax: float32 [], largest absolute input seen in calibration; 0 until then. Part of the state dict,
            identical on all tensor- and data-parallel ranks.
        mode: what forward does with the quantizers.
    """

    site: LinearSite
    quantization: LinearFormat
    mode: QuantizerMode
    weight: Tensor
    input_amax: Tensor

    def __init__(self, *args: Any, site: LinearSite, quantization: LinearFormat, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.site = site
        self.quantization = quantization
        self.mode = QuantizerMode.OFF
        self.register_buffer("input_amax", torch.zeros((), dtype=torch.float32, device=self.weight.device))
        self._quantized_weight: Tensor | None = None

    def export_weight(self) -> Tensor:
        """The weight as the checkpoint will hold it before quantization: BF16 [out(/tp), in(/tp)], no gradient."""
        return self.weight.detach().to(EXPORT_DTYPE)

    def weight_amax(self) -> Tensor:
        """float32 []: largest absolute weight of this rank's shard."""
        return tensor_amax(self.export_weight())

    @torch.no_grad()
    def set_quantized_weight(self, amax: Tensor) -> None:
        """Quantize the weight for the coming forwards. ``amax``: float32 [], the maximum over all shards."""
        self._quantized_weight = number_format(self.quantization.weights).round_weight(self.weight, amax)

    @property
    def quantized_weight(self) -> Tensor:
        """[out(/tp), in(/tp)] in the weight's dtype: what forward multiplies with."""
        assert self._quantized_weight is not None, "refresh_weights() must run before a quantized forward"
        return self._quantized_weight

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replace the operands, then multiply as Megatron-Core does. Sharding as in its ``_forward_impl``."""
        if self.mode is QuantizerMode.CALIBRATE:
            self.input_amax.copy_(torch.maximum(self.input_amax, tensor_amax(input.detach())))
        elif self.mode is QuantizerMode.ON:
            weight = straight_through(weight, self.quantized_weight)
            if self.quantization.activations != "none":
                input = number_format(self.quantization.activations).round_input(input, self.input_amax)
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


class NVFP4ColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """[s(/tp), b, in] -> [s, b, out/tp]; collectives those of Megatron-Core's ``ColumnParallelLinear``."""


class NVFP4RowParallelLinear(QuantizedLinear, RowParallelLinear):
    """[s, b, in/tp] -> [s(/tp), b, out]; collectives those of Megatron-Core's ``RowParallelLinear``."""
