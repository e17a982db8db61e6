"""Quantized linear layers, emulated: Megatron-Core's parallel layers computing on fake-quantized operands.

Forward, with W and X as a real NVFP4 GEMM would see them (or one in another format of ``numbers.py``)::

    Y = round_input(X, input_amax) @ round_weight(W, weight_amax)^T

Backward is straight-through (QAD, arXiv 2601.20088): gradients are those of the GEMM on the fake-quantized operands,
handed unchanged to X and W, in high precision. Everything parallel (sequence-parallel gather, input-gradient
all-reduce, output reduce) stays Megatron-Core's: only the operands of ``_forward_impl`` are replaced.

Scales. The input scale is static, from calibration, and shared by all ranks and by the modules fused in this layer; or
dynamic, each token's own. Per token, and not per call of the layer, because a token then rounds alike whatever it is
batched with and whatever comes after it, in training, prefill and decoding, on any number of ranks. Where ranks divide
the contraction dim (row-parallel), the token's amax is the maximum over them; sequence parallelism divides tokens.
The weight scale follows the weight as it trains, unless it is frozen or learned (``scales.py``):
``model.refresh`` quantizes every weight once per optimizer step, not once per microbatch, and forward uses that
copy. With sequence parallelism the input is quantized before it is gathered: blocks lie along the hidden dim, so the
values are the same and each rank does its share.

Memory. A fake-quantized input is a four-bit number with shared scales, so that is what is kept of it for backward: its
codes and block scales, 4.5 bits per element instead of 16. Megatron-Core's function saves the input itself; a hook on
that very tensor hands it the packed form and unpacks it in backward, bit for bit. Its collectives, sequence-parallel
gather and recomputation do not know.

Weights are rounded to BF16, the dtype of the checkpoint, before they are quantized, also in FP32 runs: what is
trained is then exactly what is exported.
"""

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megaqad.models.model import QuantizerParameter
from megaqad.models.weights import Weight
from megaqad.nvfp4 import (
    BLOCK_SIZE,
    NVFP4Tensor,
    choose_scales,
    dequantize,
    fake_quantize_packed,
    straight_through,
)
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.numbers import EXPORT_DTYPE, number_format
from megaqad.quantization.scales import DEFAULT_SCALING, LearnedScales, Scaling
from megaqad.quantization.site import QuantizerMode, WeightSite


class _PackedFakeQuantize(torch.autograd.Function):
    """Forward: fake quantization, with the packed form kept in the graph. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor) -> Tensor:
        values, packed = fake_quantize_packed(x, amax)
        ctx.save_for_backward(packed.codes, packed.block_scales, packed.global_scale)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class PackedInput:
    """A fake-quantized input, and the hooks by which whatever saves it for backward saves its packed form.

    The packed tensors belong to the graph node that made the input, so that hooks further out (offloading, counting)
    see them as any saved tensor. An input that needs no gradient has no such node; then they are kept here.
    """

    def __init__(self, x: Tensor, amax: Tensor) -> None:
        """``x``: [..., K], K a multiple of 16; ``amax``: float32 [] or [..., 1], as ``fake_quantize`` takes it."""
        self.values: Tensor
        if x.requires_grad:
            self.values = cast(Tensor, _PackedFakeQuantize.apply(x, amax))
            node: Any = self.values.grad_fn
            self._packed = lambda: node.saved_tensors
        else:
            self.values, packed = fake_quantize_packed(x, amax)
            self._packed = lambda: (packed.codes, packed.block_scales, packed.global_scale)

    def saving(self) -> AbstractContextManager[None]:
        """Within it, saving ``values`` keeps no reference to them; anything else is saved as it is."""
        mine, dtype, packed = self.values.data_ptr(), self.values.dtype, self._packed

        def pack(tensor: Tensor) -> Any:
            return packed if tensor.data_ptr() == mine else tensor

        def unpack(saved: Any) -> Tensor:
            return saved if isinstance(saved, Tensor) else dequantize(NVFP4Tensor(*saved()), dtype)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class QuantizedLinear(WeightSite):
    """The quantizers of one parallel linear layer; mixed in before Megatron-Core's layer.

    Attributes beside those of ``WeightSite``:
        packs_inputs: keep inputs packed for backward. Off is the readable form, the oracle of the tests.
        weight_amax, weight_block_amax: float32 [1] and [out(/tp), in(/tp) / 16], where the weight's scales are state.
    """

    packs_inputs = True

    weight: Tensor
    weight_amax: Tensor
    weight_block_amax: Tensor

    def __init__(
        self,
        *args: Any,
        held: Weight,
        quantization: LinearFormat,
        observes: tuple[torch.distributed.ProcessGroup, ...],
        scaling: Scaling = DEFAULT_SCALING,
        **kwargs: Any,
    ) -> None:
        """``held``: the weight's description; ``observes``: ranks over which the input's maximum is taken. The others
        are Megatron-Core's, ``tp_group`` among them."""
        super().__init__(*args, **kwargs)
        self.set_up((held,), quantization, scaling, observes=observes, divides=kwargs["tp_group"])
        if self.scaling.stored:
            self._make_scales()

    def current_weight(self) -> Tensor:
        return self.weight

    @property
    def input_group(self) -> torch.distributed.ProcessGroup | None:
        return self.divides if self.weights[0].row_parallel and self.divides.size() > 1 else None

    def _make_scales(self) -> None:
        """Room for the scales that are state: parameters when learned, buffers when frozen."""
        rows, inputs = self.weight.shape
        new: dict[str, Any] = {"dtype": torch.float32, "device": self.weight.device}
        tensors = {
            "weight_amax": torch.zeros(1, **new),
            "weight_block_amax": torch.zeros(rows, inputs // BLOCK_SIZE, **new),
        }
        for name, tensor in tensors.items():
            if self.scaling.weight_scales == "learned":
                self.register_parameter(name, QuantizerParameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if self.scaling.weight_scales == "learned":
            set_tensor_model_parallel_attributes(self.weight_block_amax, True, self.cut_dim, 1)
            self.weight_amax.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    @property
    def cut_dim(self) -> int:
        """The dim of the weight that the tensor-parallel ranks divide."""
        return 1 if self.weights[0].row_parallel else 0

    @torch.no_grad()
    def choose_scales(self, amax: Tensor) -> None:
        """Calibrate the scales that are state. ``amax``: float32 [1], the maximum over all shards."""
        chosen, blocks = choose_scales(self.export_weight(), amax.reshape(()), self.scaling.calibration)
        self.weight_amax.copy_(chosen)
        self.weight_block_amax.copy_(blocks)

    def weight_scales(self, amax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in ``WeightSite``, or the ones that are state."""
        if not self.scaling.stored:
            return super().weight_scales(amax)
        return self.weight_amax.detach().reshape(()).clone(), self.weight_block_amax.detach().clone()

    def _operand(self, weight: Tensor) -> Tensor:
        """The quantized copy, with gradients to what it is made from."""
        if self.scaling.weight_scales != "learned":
            return straight_through(weight, self.quantized_weight)
        ranks = self.divides.size()
        scales = (self.weight_amax, self.weight_block_amax)
        return cast(Tensor, LearnedScales.apply(weight, *scales, self.quantized_weight, EXPORT_DTYPE, ranks))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replace the operands, then multiply as Megatron-Core does. Sharding as in its ``_forward_impl``."""
        if self.mode is QuantizerMode.CALIBRATE:
            self.observe(input)
        elif self.mode is QuantizerMode.ON:
            weight = self._operand(weight)
            activations = self.quantization.activations
            saves_input = torch.is_grad_enabled() and weight.requires_grad
            if activations == "nvfp4" and self.packs_inputs and saves_input:
                packed = PackedInput(input, self.amax_of(input))
                with packed.saving():
                    return super()._forward_impl(packed.values, weight, *args, **kwargs)  # type: ignore[misc]
            if activations != "none":
                input = number_format(activations).round_input(input, self.amax_of(input))
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


class NVFP4ColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """[s(/tp), b, in] -> [s, b, out/tp]; collectives those of Megatron-Core's ``ColumnParallelLinear``."""


class NVFP4RowParallelLinear(QuantizedLinear, RowParallelLinear):
    """[s, b, in/tp] -> [s(/tp), b, out]; collectives those of Megatron-Core's ``RowParallelLinear``."""
