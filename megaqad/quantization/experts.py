"""The experts of a layer as one site: one grouped product on rounded operands, one call to quantize all their weights.

Each expert's weight has scales of its own, shared by its gate and up. Inputs have one scale, the largest of the layer:
engines take the maximum over all experts, or each expert's own, depending on the kernel that they choose, and with the
same value for all of them both compute what was trained. An expert that no token reached in calibration has it too.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.blocks.block import Builder
from megaqad.models.blocks.grouped import GroupedLinear, grouped_product
from megaqad.models.weights import Weight
from megaqad.nvfp4 import choose_scales, straight_through, tensor_amax
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.layers import PackedInput
from megaqad.quantization.numbers import number_format
from megaqad.quantization.scales import Scaling
from megaqad.quantization.site import Observed, QuantizerMode, WeightSite


class QuantizedExperts(WeightSite, GroupedLinear):
    """``GroupedLinear`` with quantizers; scales are float32 [e] and, chosen for blocks, [e, out, in / 16]."""

    def __init__(
        self,
        weights: Sequence[Weight],
        builder: Builder,
        quantization: LinearFormat,
        scaling: Scaling,
        *,
        observes: tuple[dist.ProcessGroup, ...],
        siblings: tuple[dist.ProcessGroup, ...],
    ) -> None:
        """
        Args:
            weights: of this rank's experts.
            observes: ranks that see other parts of the rows of these experts, or other rows.
            siblings: ranks that hold the layer's other experts.
        """
        super().__init__(weights, builder)
        group = builder.ranks.tensor_group
        self.siblings = siblings
        self._cut_group = group if weights[0].row_parallel and group.size() > 1 else None
        self.set_up(weights, quantization, scaling, observes=observes, divides=group)

    def current_weight(self) -> Tensor:
        return self.weight

    @property
    def input_group(self) -> dist.ProcessGroup | None:
        return self._cut_group

    def observed(self) -> list[Observed]:
        if not self.quantization.calibrates_inputs:
            return []
        names = tuple(weight.modules[0] for weight in self.weights)
        return [Observed(names, "input", self.input_amax, self.observes, layer_groups=self.siblings, shared=True)]

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """As ``GroupedLinear.forward``."""
        if self.mode is QuantizerMode.CALIBRATE and self.quantization.calibrates_inputs:
            for place, part in enumerate(rows.detach().split(counts)):
                if len(part):
                    self.input_amax[place] = torch.maximum(self.input_amax[place], tensor_amax(part))
        if self.mode is not QuantizerMode.ON:
            return grouped_product(rows, self.weight, counts)
        weight = straight_through(self.weight, self.quantized_weight)
        activations = self.quantization.activations
        if activations == "nvfp4" and len(rows) and torch.is_grad_enabled() and self.weight.requires_grad:
            packed = PackedInput(rows, self.amax_of(rows))
            with packed.saving():
                return grouped_product(packed.values, weight, counts)
        if activations != "none" and len(rows):
            rows = number_format(activations).round_input(rows, self.amax_of(rows))
        return grouped_product(rows, weight, counts)

    def amax_of(self, x: Tensor) -> Tensor:
        return super().amax_of(x) if self.quantization.dynamic else self.input_amax[0]  # the layer's, as all of them

    def largest_weights(self) -> Tensor:
        return self.export_weight().abs().amax(dim=(1, 2)).float()

    def weight_scales(self, amax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert amax is not None, "experts' scales follow their weights"
        if self.scaling.calibration == "max":
            return amax, None
        chosen = [
            choose_scales(weight, largest, self.scaling.calibration)
            for weight, largest in zip(self.export_weight(), amax, strict=True)
        ]
        return torch.stack([scale for scale, _ in chosen]), torch.stack([blocks for _, blocks in chosen])
