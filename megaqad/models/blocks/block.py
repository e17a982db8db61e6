"""What every block says of itself, and what it is given to build its module.

A description is made before any rank starts, to refuse what cannot work; so Megatron-Core, which takes seconds to
import, is imported only where modules are built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from megaqad.models.operations import PLAIN, Operations
from megaqad.models.weights import Weight
from megaqad.runtime.sizes import ParallelSizes

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megaqad.runtime.ranks import Ranks


class Choices(Protocol):
    """Which modules stand where a recipe may quantize; ``plain.PlainChoices`` quantizes nothing."""

    def linear(self, weight: Weight) -> "type | ModuleSpec":
        """The module of a linear layer; built with the arguments of Megatron's parallel linear layers."""
        ...

    def experts(self, weights: Sequence[Weight], builder: "Builder") -> nn.Module:
        """The linear layers of one rank's experts as one module: (rows [t, in], rows of each) -> [t, out]."""
        ...

    def cache(self, key: str, value: str) -> nn.Module | None:
        """What rounds the keys and values that attention sees, given the modules that make them: a module called with
        (key, value) that returns both; None leaves them alone."""
        ...


@dataclass(frozen=True)
class Builder:
    """What a block builds its module with."""

    config: "TransformerConfig"
    ranks: "Ranks"
    choices: Choices
    operations: Operations = PLAIN
    layer: int | None = None
    """Index of the layer that is built."""
    prefix: str = ""
    """Of the names of a block's weights within the layer."""

    def within(self, name: str) -> "Builder":
        """For what is built inside the module ``name``."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def placed(self, weight: Weight) -> Weight:
        """A block's own weight as the architecture lists it."""
        return replace(weight, name=self.prefix + weight.name, layer=self.layer)

    @property
    def device(self) -> torch.device:
        return torch.device(torch.cuda.current_device())  # on a machine without a GPU ``runtime/cpu.py`` says cpu

    def grouped_linear(self, weights: Sequence[Weight]) -> nn.Module:
        """The linear layers of this rank's experts."""
        return self.choices.experts([self.placed(weight) for weight in weights], self)

    def linear(self, weight: Weight, *, bias: bool = False) -> nn.Module:
        """The parallel linear layer of ``weight``: columns of its output or rows of its input are divided.

        Called with [s(/tp), b, in] it returns ([s, b, out/tp], None), or with [s, b, in/tp] ([s(/tp), b, out], None).
        """
        from megatron.core.transformer.spec_utils import build_module

        ranks = self.ranks.sizes.tensor
        spans = [part.box(self.ranks.tensor_rank, ranks)[0] for part in weight.parts]
        rows = sum(stop - start for start, stop in spans)  # of this rank, shared heads included
        own: dict[str, Any]
        if weight.row_parallel:
            own = {"init_method": self.config.output_layer_init_method, "input_is_parallel": True}
        else:
            own = {"init_method": self.config.init_method, "gather_output": False}
            rows *= ranks
        module: nn.Module = build_module(
            self.choices.linear(self.placed(weight)),
            weight.parts[0].size[1],
            rows,
            config=self.config,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.ranks.tensor_group,
            **own,
        )
        return module


class Block(Protocol):
    """One kind of block with its sizes; of the whole model, before any division."""

    def weights(self) -> Sequence[Weight]:
        """Its weights in checkpoint order, named within its module."""
        ...

    def build(self, builder: Builder) -> nn.Module:
        """Its module: ([s(/tp), b, h], ``Tables``) -> [s(/tp), b, h]."""
        ...

    def refuse(self, sizes: ParallelSizes) -> str | None:
        """Why it cannot be divided so; None when it can."""
        ...

    def flops(self, tokens: int) -> float:
        """Of its forward pass over a sequence of ``tokens``, per token: multiplications and additions of its matrix
        products."""
        ...


def product_flops(weights: Sequence[Weight]) -> float:
    """Forward FLOPs per token of linear layers."""
    return 2.0 * sum(weight.numel for weight in weights if len(weight.parts[0].size) == 2)
