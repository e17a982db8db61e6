"""Byte equality with ModelOpt itself: its tensor class, and checkpoints that it calibrates and exports on the spot."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megaqad.nvfp4 import NVFP4Tensor, dequantize, fake_quantize, global_scale_from_amax, quantize, tensor_amax
from tests.nvfp4 import data
from tests.nvfp4.data import DTYPES, KINDS, assert_same_bits
from tests.nvfp4.implementations import NATIVE

IMPLS = ("reference", "torch", NATIVE)
QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def modelopt(x: torch.Tensor, s2: torch.Tensor | None = None) -> tuple[NVFP4Tensor, torch.Tensor]:
    """What ModelOpt stores for ``x``, and what it reads back."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    q, block_scales, s2 = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=s2)
    values = q.dequantize(dtype=x.dtype, scale=block_scales, double_scale=s2, block_sizes={-1: 16})
    return NVFP4Tensor(q._quantized_data, block_scales, s2), values


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert_same_bits(a.global_scale, b.global_scale)
    assert_same_bits(a.block_scales, b.block_scales)
    assert_same_bits(a.codes, b.codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_class(dtype, kind):
    """The reference, whose bits all implementations have (``test_implementations.py``)."""
    for seed in range(3):
        x = data.make(kind, dtype, seed)
        if not x.any():
            pytest.skip("all of it underflows in this dtype, and ModelOpt divides a zero tensor by zero")
        for amax in (None, tensor_amax(x) * 0.4, tensor_amax(x) * 3):
            ours = quantize(x, amax, impl="reference")
            theirs, values = modelopt(x, None if amax is None else ours.global_scale)
            assert_same(ours, theirs)
            assert_same_bits(fake_quantize(x, amax, impl="reference"), values)
            assert_same_bits(dequantize(theirs, dtype, impl="reference"), values)


@pytest.mark.parametrize("impl", IMPLS)
def test_random_tensors(impl):
    """Random scale, tail and shape: sixty tensors."""
    g = torch.Generator().manual_seed(11)
    for _ in range(60):
        rows, blocks = torch.randint(1, 40, (2,), generator=g).tolist()
        exponent = int(torch.randint(-30, 20, (), generator=g))
        power = 1 + 2 * torch.rand((), generator=g)
        x = torch.randn(rows, 16 * blocks, generator=g)
        x = (x.sign() * x.abs() ** power * 2.0**exponent).to(torch.bfloat16)
        ours, (theirs, values) = quantize(x, impl=impl), modelopt(x)
        assert_same(ours, theirs)
        assert_same_bits(fake_quantize(x, impl=impl), values)


@dataclass
class Export:
    weights: dict[str, torch.Tensor]  # before quantization
    input_amax: dict[str, torch.Tensor]  # largest input of each linear over the calibration batches
    tensors: dict[str, torch.Tensor]  # the exported checkpoint


def _tiny_llama(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():  # tails as trained weights have them
        if parameter.dim() == 2:
            parameter.data.mul_(torch.rand(len(parameter), 1).exp().to(torch.bfloat16) ** 2)
    return model


@pytest.fixture(scope="module", params=[0, 1])
def export(request, tmp_path_factory) -> Export:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    model = _tiny_llama(request.param)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    input_amax: dict[str, torch.Tensor] = {}

    def watch(name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            amax = tensor_amax(args[0])
            input_amax[name] = torch.maximum(input_amax[name], amax) if name in input_amax else amax

        model.get_submodule(name).register_forward_pre_hook(hook)

    for name, _ in model.named_modules():
        if name.endswith(QUANTIZED):
            watch(name)
    batches = [torch.randint(0, 128, (2, 24)) for _ in range(3)]

    def calibrate(m: torch.nn.Module) -> None:
        for batch in batches:
            m(batch)

    mtq.quantize(model, copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), calibrate)
    calibrated = dict(input_amax)  # the exporter runs the model once more, on inputs of its own
    folder: Path = tmp_path_factory.mktemp("modelopt")
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    return Export(weights, calibrated, tensors)


@pytest.mark.parametrize("impl", IMPLS)
def test_exported_checkpoint(export, impl):
    """Every quantized linear of a calibrated, exported model, from nothing but its BF16 weight and its siblings'."""
    names = [k.removesuffix(".weight_scale_2") for k in export.tensors if k.endswith(".weight_scale_2")]
    assert len(names) == 2 * len(QUANTIZED)
    for name in names:
        parent, leaf = name.rsplit(".", 1)
        group = next((g for g in FUSED if leaf in g), (leaf,))
        amax = torch.stack([tensor_amax(export.weights[f"{parent}.{m}.weight"]) for m in group]).amax()
        weight_tensors = (export.tensors[f"{name}.{k}"] for k in ("weight", "weight_scale", "weight_scale_2"))
        assert_same(quantize(export.weights[f"{name}.weight"], amax, impl=impl), NVFP4Tensor(*weight_tensors))


def test_exported_input_scales(export):
    """``input_scale`` is the global scale of the inputs' amax, by the same rule as a weight's."""
    assert len(export.input_amax) == 2 * len(QUANTIZED)
    for name, amax in export.input_amax.items():
        assert_same_bits(global_scale_from_amax(amax), export.tensors[f"{name}.input_scale"])
