"""The feed-forward block: one activation, with or without a gate."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from megaqad.models.blocks.block import Builder, product_flops
from megaqad.models.blocks.rotary import Tables
from megaqad.models.operations import ACTIVATIONS
from megaqad.models.weights import COLUMN, ROW, WHOLE, Copy, GateUp, HfTensor, Join, Weight
from megaqad.runtime.sizes import ParallelSizes

NAMES = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""transformers' names of ``ACTIVATIONS`` that are not theirs."""


def activation_of(name: str) -> str | None:
    """The key of ``ACTIVATIONS`` that transformers' ``hidden_act`` means; None when it is none of them."""
    known = NAMES.get(name, name)
    return known if known in ACTIVATIONS else None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """down(activation(gate x) * up x), or down(activation(up x))."""

    module: str
    """Its Hugging Face name; the projections are ``<module>.gate_proj`` and so on."""
    hidden: int
    ffn: int
    activation: str = "silu"
    """A key of ``ACTIVATIONS``."""
    gated: bool = True
    bias: bool = False
    fused: str | None = None
    """Name of the projection in whose rows the file holds gate, then up; None: they are apart."""

    def _projections(self, ending: str, *inputs: int) -> tuple[HfTensor, ...]:
        names = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        if self.fused is None:
            return tuple(HfTensor(f"{self.module}.{name}.{ending}", (self.ffn, *inputs), COLUMN) for name in names)
        whole = (2 * self.ffn, *inputs)
        name = f"{self.module}.{self.fused}.{ending}"
        return tuple(HfTensor(name, whole, COLUMN, (first, first + self.ffn)) for first in (0, self.ffn))

    @property
    def _join(self) -> Join:
        return GateUp() if self.gated else Copy()

    @property
    def fc1(self) -> Weight:
        parts = self._projections("weight", self.hidden)
        return Weight("linear_fc1.weight", parts, self._join, linear=True)

    @property
    def fc2(self) -> Weight:
        part = HfTensor(f"{self.module}.down_proj.weight", (self.hidden, self.ffn), ROW)
        return Weight("linear_fc2.weight", (part,), linear=True)

    def weights(self) -> Sequence[Weight]:
        if not self.bias:
            return [self.fc1, self.fc2]
        down = HfTensor(f"{self.module}.down_proj.bias", (self.hidden,), WHOLE)
        first = Weight("linear_fc1.bias", self._projections("bias"), self._join)
        return [self.fc1, first, self.fc2, Weight("linear_fc2.bias", (down,))]

    def build(self, builder: Builder) -> nn.Module:
        return FeedForward(self, builder)

    def refuse(self, sizes: ParallelSizes) -> str | None:
        if self.ffn % sizes.tensor == 0:
            return None
        return (
            f"parallel.tensor={sizes.tensor} does not divide the feed-forward size {self.ffn} of {self.module}; choose "
            "a divisor"
        )

    def flops(self, tokens: int) -> float:
        return product_flops([self.fc1, self.fc2])


class FeedForward(nn.Module):
    """[s(/tp), b, h] -> [s(/tp), b, h]; collectives those of its two parallel linear layers."""

    def __init__(self, block: Mlp, builder: Builder) -> None:
        super().__init__()
        self.linear_fc1 = builder.linear(block.fc1, bias=block.bias)
        self.linear_fc2 = builder.linear(block.fc2, bias=block.bias)
        self.activation, self.gated, self.operations = block.activation, block.gated, builder.operations

    def forward(self, hidden: Tensor, tables: Tables) -> Tensor:
        inner, _ = self.linear_fc1(hidden)  # [s, b, ffn / tp], twice that with a gate
        activation = self.activation
        inner = self.operations.gated(inner, activation) if self.gated else ACTIVATIONS[activation](inner)
        output: Tensor = self.linear_fc2(inner)[0]
        return output
