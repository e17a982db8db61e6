"""On a GPU with NVFP4: a Transformer Engine layer is the emulated layer, forward and backward."""

import pytest
import torch
import torch.distributed as dist

from megaqad.quantization import backend

BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= backend.LEAST_CAPABILITY
pytestmark = [
    pytest.mark.skipif(not BLACKWELL, reason="no GPU with NVFP4 (compute capability 10.0)"),
    pytest.mark.skipif(backend._transformer_engine_version() is None, reason="Transformer Engine is not installed"),
]
TOKENS, INPUTS, OUTPUTS = 128, 256, 384


@pytest.fixture
def one_rank():
    from megaqad.runtime.ranks import ParallelSizes, join_ranks, parallel

    join_ranks()
    with parallel(ParallelSizes()) as ranks:
        yield ranks
    dist.destroy_process_group()


def layers(kind, ranks):
    """(Transformer Engine, emulated) with the same BF16 weight."""
    from megatron.core.transformer import TransformerConfig

    from megaqad.models.weights import COLUMN, ROW, HfTensor, Weight
    from megaqad.quantization.formats import LinearFormat
    from megaqad.quantization.layers import NVFP4ColumnParallelLinear, NVFP4RowParallelLinear
    from megaqad.quantization.transformer_engine import transformer_engine_layers

    emulated = {"column": NVFP4ColumnParallelLinear, "row": NVFP4RowParallelLinear}
    split = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    config = TransformerConfig(
        num_layers=1, hidden_size=INPUTS, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16
    )
    made = [
        layer(
            INPUTS,
            OUTPUTS,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=ranks.tensor_group,
            held=Weight("weight", (HfTensor("layer.weight", (OUTPUTS, INPUTS), COLUMN if kind == "column" else ROW),)),
            observes=(ranks.tensor_group, ranks.data_group),
            quantization=LinearFormat("nvfp4", "nvfp4"),
            **split,
        )
        for layer in (transformer_engine_layers()[kind], emulated[kind])
    ]
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    with torch.no_grad():
        for layer in made:
            layer.weight.copy_(weight)
    return made


@pytest.mark.parametrize("kind", ["column", "row"])
def test_forward_and_backward(one_rank, kind):
    """Equal but for ties, which the engine's reciprocal form rounds otherwise: a few codes in a thousand, one step."""
    from megaqad.models.model import Model
    from megaqad.quantization.calibrate import calibrate

    x = torch.randn(TOKENS, 2, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16().clamp(-3, 3)
    x[0, 0, 0] = 3.0
    gradient = torch.randn(TOKENS, 2, OUTPUTS, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()
    results = []
    for layer in layers(kind, one_rank):
        inputs = x.cuda().requires_grad_()
        calibrate(Model(None, [layer], one_rank), lambda layer=layer, inputs=inputs: layer(inputs.detach()))
        assert layer.input_amax.item() == 3.0
        output, _ = layer(inputs)
        output.backward(gradient)
        results.append([tensor.float() for tensor in (output.detach(), inputs.grad, layer.weight.grad)])
    for ours, theirs in zip(*results, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.01  # rounding to NVFP4 itself is 0.1


@pytest.mark.parametrize("kind", ["column", "row"])
def test_with_quantizers_off_it_is_the_bf16_layer(one_rank, kind):
    x = torch.randn(TOKENS, 1, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    ours, theirs = (layer(x)[0].float() for layer in layers(kind, one_rank))
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-3
