"""The modules of a model that nothing rounds."""

from collections.abc import Sequence

from torch import nn

from megaqad.models.blocks.block import Builder
from megaqad.models.blocks.grouped import GroupedLinear
from megaqad.models.weights import Weight


class PlainChoices:
    """Megatron-Core's layers."""

    def linear(self, weight: Weight) -> type:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        return RowParallelLinear if weight.row_parallel else ColumnParallelLinear

    def experts(self, weights: Sequence[Weight], builder: Builder) -> nn.Module:
        return GroupedLinear(weights, builder)

    def cache(self, key: str, value: str) -> nn.Module | None:
        return None
