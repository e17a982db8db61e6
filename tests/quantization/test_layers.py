"""The parallel NVFP4 layers compute, forward and backward, what one dense layer on fake-quantized operands does."""

import pytest
import torch

from megaqad.export.dequantizer import round_fp8_tokens, round_nvfp4_tokens
from megaqad.nvfp4 import fake_quantize, tensor_amax
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.numbers import number_format

TOKENS, INPUTS, OUTPUTS = 6, 64, 96


def operands():
    """Input [s, b, in], weight [out, in] representable in BF16, output gradient [s, b, out]."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, 2, INPUTS, generator=generator) * torch.logspace(-3, 1, TOKENS)[:, None, None]
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator).bfloat16().float()
    gradient = torch.randn(TOKENS, 2, OUTPUTS, generator=generator)
    return x, weight, gradient


def input_amax(x):
    """Largest absolute value, rounded up to BF16 as calibration does."""
    nearest = x.detach().abs().max().bfloat16()
    above = torch.nextafter(nearest, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return (nearest if nearest.float() >= x.detach().abs().max() else above).float()


def rounded(x, activations):
    """The whole input as the layer should multiply it: by its calibrated scale, or as the exports' reader does."""
    if activations == "dynamic nvfp4":
        return round_nvfp4_tokens(x)
    if activations == "dynamic fp8":
        return round_fp8_tokens(x)
    return fake_quantize(x, input_amax(x)) if activations == "nvfp4" else x


def dense(activations):
    """Reference: output, input gradient and weight gradient of the whole layer."""
    x, weight, gradient = operands()
    inputs = rounded(x, activations).requires_grad_()
    numbers = number_format(FORMATS[activations].weights)
    quantized = numbers.round_weight(weight, tensor_amax(weight)).requires_grad_()
    output = inputs @ quantized.t()
    output.backward(gradient)
    return output.detach(), inputs.grad, quantized.grad


FORMATS = {
    "nvfp4": LinearFormat("nvfp4", "nvfp4"),
    "none": LinearFormat("nvfp4", "none"),
    "dynamic nvfp4": LinearFormat("nvfp4", "nvfp4", dynamic=True),
    "dynamic fp8": LinearFormat("fp8", "fp8", dynamic=True),
}


def parallel_layer(rank, world_size, kind, sequence, activations):
    """The same through the tensor-parallel layer; this rank's output, input gradient and weight gradient."""
    from megatron.core.transformer import TransformerConfig

    from megaqad.models.model import Model
    from megaqad.models.weights import COLUMN, ROW, HfTensor, Weight
    from megaqad.quantization.calibrate import calibrate
    from megaqad.quantization.layers import NVFP4ColumnParallelLinear, NVFP4RowParallelLinear
    from megaqad.quantization.site import QuantizerMode
    from megaqad.runtime.ranks import ParallelSizes, parallel

    with parallel(ParallelSizes(tensor=world_size, sequence=sequence)) as ranks:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=INPUTS,
            num_attention_heads=4,
            tensor_model_parallel_size=world_size,
            sequence_parallel=sequence,
            gradient_accumulation_fusion=False,
        )
        layer_type = NVFP4ColumnParallelLinear if kind == "column" else NVFP4RowParallelLinear
        split = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
        layer = layer_type(
            INPUTS,
            OUTPUTS,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            held=Weight("weight", (HfTensor("layer.weight", (OUTPUTS, INPUTS), COLUMN if kind == "column" else ROW),)),
            observes=(ranks.tensor_group, ranks.data_group),
            tp_group=ranks.tensor_group,
            quantization=FORMATS[activations],
            **split,
        )
        x, weight, gradient = operands()
        cut = 0 if kind == "column" else 1
        with torch.no_grad():
            layer.weight.copy_(weight.chunk(world_size, cut)[rank])
        whole_input = x if kind == "column" else x.chunk(world_size, -1)[rank]
        ours = whole_input.chunk(world_size)[rank] if sequence and kind == "column" else whole_input
        ours = ours.clone().requires_grad_()
        dynamic = layer.quantization.dynamic
        calibrate(Model(None, [layer], ranks), None if dynamic else lambda: layer(ours.detach()))
        output, _ = layer(ours)
        wanted = gradient.chunk(world_size, -1)[rank] if kind == "column" else gradient
        wanted = wanted.chunk(world_size)[rank] if sequence and kind == "row" else wanted
        assert layer.mode is QuantizerMode.ON
        output.backward(wanted)
        return output.detach(), ours.grad, layer.weight.grad, layer.input_amax.item()


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize(
    ("kind", "ranks", "sequence"),
    [("column", 1, False), ("column", 2, False), ("column", 2, True), ("row", 2, False), ("row", 2, True)],
)
def test_parallel_equals_dense(run_ranks, kind, ranks, sequence, activations):
    output, input_gradient, weight_gradient = dense(activations)
    found = run_ranks(ranks, parallel_layer, kind, sequence, activations)
    outputs, input_gradients, weight_gradients, amaxes = zip(*found, strict=True)
    (amax,) = set(amaxes)  # the same on every rank, the maximum of all, rounded up to BF16; 0 where nobody asks for it
    largest = operands()[0].abs().max()
    unread = activations == "none" or FORMATS[activations].dynamic
    assert amax == 0 if unread else largest <= amax < largest * (1 + 2**-7)
    assert torch.tensor(amax).bfloat16().item() == amax
    if kind == "column":
        joined_output = torch.cat(outputs, -1)
        joined_input = torch.cat(input_gradients) if sequence else input_gradients[0]
    else:
        joined_output = torch.cat(outputs) if sequence else outputs[0]
        joined_input = torch.cat(input_gradients, -1)
    torch.testing.assert_close(joined_output, output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined_input, input_gradient, rtol=1e-5, atol=1e-5)
    joined_weight = torch.cat(weight_gradients, 0 if kind == "column" else 1)
    torch.testing.assert_close(joined_weight, weight_gradient, rtol=1e-5, atol=1e-5)


def grown_weight(rank, world_size):
    """Largest quantized weight before and after one weight grows tenfold."""
    from megaqad.quantization.model import switch, weight_sites
    from megaqad.quantization.site import QuantizerMode
    from megaqad.runtime.ranks import ParallelSizes, parallel
    from tests.quantization.models import small_quantized_model

    with parallel(ParallelSizes(tensor=world_size)) as ranks:
        model = small_quantized_model(ranks)
        switch(model, QuantizerMode.ON)
        layer = weight_sites(model)[0]
        before = layer.quantized_weight.abs().max().item()
        with torch.no_grad():
            if rank == 0:
                layer.weight[0, 0] = 10 * before
        model.changed()
        return before, layer.quantized_weight.abs().max().item(), 10 * before


def test_a_weight_that_grows_is_not_clipped(run_ranks):
    """ModelOpt freezes the calibrated amax; a weight that outgrows it would saturate."""
    _, after, wanted = run_ranks(2, grown_weight)[0]
    assert after == pytest.approx(wanted, rel=0.01)
