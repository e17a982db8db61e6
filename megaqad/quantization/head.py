"""The output head in a number format: what the losses multiply, on both sides.

Losses take hidden states and a head, and make the logits themselves. So the model hands out both as an engine would
multiply them: ``CausalLM.forward`` its last hidden states rounded, ``head_weight`` the rounded weight. Gradients pass
straight through to the hidden states and to the parameter.

The weight's scales are always refreshed, by the recipe's calibration method; they are no state, and nothing learns
them: a head's gradient is made inside the losses, where block scales have no place.
"""

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megaqad.models.causal_lm import Head
from megaqad.models.weights import Weight
from megaqad.nvfp4 import straight_through
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.numbers import number_format
from megaqad.quantization.scales import DEFAULT_SCALING, Scaling
from megaqad.quantization.site import QuantizerMode, WeightSite


class HeadSite(WeightSite, Head):
    """The quantizers of the output head. Its rows are cut over the tensor-parallel ranks, its inputs are whole."""

    def __init__(
        self,
        rows: Callable[[], Tensor],
        held: Weight,
        quantization: LinearFormat,
        scaling: Scaling = DEFAULT_SCALING,
        *,
        observes: tuple[dist.ProcessGroup, ...],
        divides: dist.ProcessGroup,
    ) -> None:
        """``rows``: gives this rank's rows of the head [real rows, h]; none where the shard is all padding. The rest as
        for ``WeightSite.set_up``."""
        super().__init__()
        self._rows = rows
        scaling = replace(scaling, weight_scales="refreshed")
        self.set_up((held,), quantization, scaling, observes=observes, divides=divides)

    def current_weight(self) -> Tensor:
        return self._rows()

    def head(self, weight: Tensor) -> Tensor:
        """What the loss multiplies with in place of ``weight`` [real rows, h]; no collectives."""
        return straight_through(weight, self.quantized_weight) if self.mode is QuantizerMode.ON else weight

    def forward(self, hidden: Tensor) -> Tensor:
        """The last hidden states [s(/tp), b, h] as the head's GEMM sees them; no collectives."""
        if self.mode is QuantizerMode.CALIBRATE:
            self.observe(hidden)
        elif self.mode is QuantizerMode.ON and self.quantization.activations != "none":
            return number_format(self.quantization.activations).round_input(hidden, self.amax_of(hidden))
        return hidden
