"""The Transformer Engine backend: the same layers on real NVFP4 GEMMs, for GPUs that have them (Blackwell).

Megatron-Core's Transformer Engine layers take the place of its local ones; everything parallel stays theirs, norms,
attention and the head stay ours. A layer opens Transformer Engine's autocast around its own forward, so that what the
recipe keeps in BF16 stays BF16, quantizers switch layer by layer, and recomputation meets the context again.

The recipe is what makes the GEMM the function that the emulated layer computes: blocks of 1 x 16 for weights too, no
Hadamard transform, no stochastic rounding. ``backward_override="dequantized"`` multiplies gradients in BF16 with the
values that the forward GEMM saw, which is the emulated layer's backward, and saves them packed.
``"high_precision"`` would multiply with the operands as they were before rounding: another gradient, and BF16 saved.

What remains different, and why an export is verified against the emulated layer: Transformer Engine takes the global
scale of an input from the tensor at hand, not from calibration, and of a weight from this rank's shard, not from all;
and it multiplies by reciprocals, which differs from the division form at exact ties (``nvfp4/engine_reference.py``).

This is the only file that imports Transformer Engine, and only when the backend is asked for.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from megaqad.nvfp4 import fake_quantize
from megaqad.quantization.layers import QuantizedLinear, QuantizerMode

RECIPE = {
    "disable_rht": True,
    "disable_stochastic_rounding": True,
    "disable_2d_quantization": True,
    "backward_override": "dequantized",
}
"""Arguments of Transformer Engine's ``NVFP4BlockScaling``."""

Autocast = Callable[[bool], AbstractContextManager[object]]
"""``autocast(enabled)``: the context under which Transformer Engine's layers quantize, or do not."""


def nvfp4_recipe() -> Any:
    """Transformer Engine's recipe with ``RECIPE``'s settings."""
    from transformer_engine.common.recipe import NVFP4BlockScaling

    return NVFP4BlockScaling(**RECIPE)


class TransformerEngineLinear(QuantizedLinear):
    """The quantizers' side of a Transformer Engine layer; mixed in before Megatron-Core's wrapper of it.

    Parameters, buffers and their shardings are those of the emulated layer, and so are a checkpoint's keys.
    """

    autocast: Autocast

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weight_is_new = True

    def refresh(self, amax: Tensor | None) -> None:
        """Have Transformer Engine quantize the weight at the next quantized forward, and keep it until called again."""
        assert amax is not None, "this backend has no scales that are state"
        self._scales = (amax.reshape(()), None)
        self._weight_is_new = True

    @property
    def quantized_weight(self) -> Tensor:
        """[out(/tp), in(/tp)] in the weight's dtype: what the export will hold; made for every call."""
        amax, _ = self.scales
        return fake_quantize(self.export_weight().to(self.weight.dtype), amax)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shapes, sharding and collectives as in Megatron-Core's layer."""
        on = self.mode is QuantizerMode.ON
        if self.mode is QuantizerMode.CALIBRATE:
            self.observe(x)
        # Megatron's wrapper hands this to Transformer Engine, which keeps a quantized weight while it is False.
        self.is_first_microbatch = self._weight_is_new
        with self.autocast(on):
            output: tuple[Tensor, Tensor | None] = super().forward(x)
        if on:
            self._weight_is_new = False
        return output


def layer_on(base: type, autocast: Autocast) -> type[TransformerEngineLinear]:
    """A quantized layer that multiplies as ``base`` does, a Megatron-Core wrapper of Transformer Engine's linear."""
    return type(f"NVFP4{base.__name__}", (TransformerEngineLinear, base), {"autocast": staticmethod(autocast)})


@functools.cache
def transformer_engine_layers() -> dict[str, type[TransformerEngineLinear]]:
    """The layers for ``column`` and ``row`` sites."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear
    from transformer_engine.pytorch import autocast

    recipe = nvfp4_recipe()

    def quantizing(enabled: bool) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = autocast(enabled=enabled, recipe=recipe)
        return context

    return {
        "column": layer_on(TEColumnParallelLinear, quantizing),
        "row": layer_on(TERowParallelLinear, quantizing),
    }
