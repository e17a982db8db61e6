"""The output head in a number format: what the losses multiply, on both sides.

Losses take hidden states and a head, and make the logits themselves. So the model hands out both as an engine would
multiply them: ``CausalLM.forward`` its last hidden states rounded, ``head_weight`` the rounded weight. Gradients pass
straight through to the hidden states and to the parameter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megaqad.models.families import LinearSite
from megaqad.nvfp4 import row_amax, straight_through, tensor_amax
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.layers import EXPORT_DTYPE, QuantizerMode
from megaqad.quantization.numbers import number_format


class HeadQuantizer(torch.nn.Module):
    """The quantizers of the output head; the attributes of ``layers.QuantizedLinear`` that the whole model's
    functions in ``state.py`` use."""

    input_amax: Tensor

    def __init__(self, weight: Callable[[], Tensor], site: LinearSite, quantization: LinearFormat) -> None:
        """``weight``: gives this rank's rows of the head [real rows, h]; asked every time, because Megatron-Core's DDP
        moves parameters into buffers of its own."""
        super().__init__()
        self._weight = weight
        self.site = site
        self.quantization = quantization
        self.mode = QuantizerMode.OFF
        self.register_buffer("input_amax", torch.zeros((), dtype=torch.float32, device=weight().device))
        self._quantized_weight: Tensor | None = None

    def export_weight(self) -> Tensor:
        """The weight as the checkpoint will hold it before quantization: BF16 [real rows, h], no gradient."""
        return self._weight().detach().to(EXPORT_DTYPE)

    def largest_weight(self) -> Tensor:
        """float32 []: largest absolute weight of this rank's shard; 0 where the shard is all padding."""
        return tensor_amax(self.export_weight())

    @torch.no_grad()
    def set_quantized_weight(self, amax: Tensor) -> None:
        """Quantize the weight for the coming forwards. ``amax``: float32 [], the maximum over all shards."""
        self._quantized_weight = number_format(self.quantization.weights).round_weight(self._weight(), amax)

    @property
    def quantized_weight(self) -> Tensor:
        """[real rows, h] in the weight's dtype."""
        assert self._quantized_weight is not None, "refresh_weights() must run before a quantized forward"
        return self._quantized_weight

    def head(self, weight: Tensor) -> Tensor:
        """What the loss multiplies with in place of ``weight`` [real rows, h]; no collectives."""
        return straight_through(weight, self.quantized_weight) if self.mode is QuantizerMode.ON else weight

    def forward(self, hidden: Tensor) -> Tensor:
        """The last hidden states [s(/tp), b, h] as the head's GEMM sees them; no collectives."""
        if self.mode is QuantizerMode.CALIBRATE and not self.quantization.dynamic:
            self.input_amax.copy_(torch.maximum(self.input_amax, tensor_amax(hidden.detach())))
        elif self.mode is QuantizerMode.ON and self.quantization.activations != "none":
            amax = row_amax(hidden) if self.quantization.dynamic else self.input_amax
            return number_format(self.quantization.activations).round_input(hidden, amax)
        return hidden
