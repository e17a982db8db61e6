"""Fused operations on a GPU against the plain ones, and what a step asks of the device."""

import json
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaqad.losses import blocks, triton_kernels
from megaqad.models.operations import PLAIN, Fused, Operations
from tests.gpu.test_journey import SETTINGS, losses, megaqad
from tests.models.checkpoints import make_checkpoint
from tests.models.test_operations import tables

DTYPES = [torch.float32, torch.bfloat16]
LEAST = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Distance of fused and plain, relative."""


def compare(run: Callable[[Operations], Callable[..., Tensor]], *inputs: Tensor) -> None:
    """Result and gradients; the plain form in FP32 of the same numbers is nearer to the truth than either."""
    found = []
    for form, dtype in ((PLAIN, torch.float32), (Fused(), inputs[0].dtype)):
        leaves = [one.detach().to(dtype).requires_grad_() for one in inputs]
        result = run(form)(*leaves)
        draw = torch.Generator(device="cuda").manual_seed(0)
        upstream = torch.randn(result.shape, generator=draw, device="cuda").bfloat16().to(dtype)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, upstream)])
    for oracle, ours in zip(*found, strict=True):
        assert (ours.float() - oracle).norm() <= LEAST[inputs[0].dtype] * oracle.norm()


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["cast_first", "weight_first", "centred"])
def test_rms_norm(order, dtype):
    inputs = random(64, 2, 2048, dtype=dtype), random(2048, dtype=dtype)
    compare(lambda form: lambda x, weight: form.rms_norm(x, weight, 1e-5, order), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "rotated"), [(32, 64, 64), (9, 128, 128), (8, 96, 48), (1, 24, 24)])
def test_rotary(heads, dim, rotated, dtype):
    cos, sin = (table.cuda() for table in tables(128, rotated, torch.float32))
    wide = random(128, 2, heads, dim + 16, dtype=dtype)
    compare(lambda form: lambda x: form.rotate(x[..., 8 : 8 + dim], cos.to(x.dtype), sin.to(x.dtype)), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated(activation, dtype):
    compare(lambda form: lambda inner: form.gated(inner, activation), random(64, 2, 4096, dtype=dtype))


@pytest.mark.parametrize("groups", [8, 2])
def test_windowed_attention(groups):
    q, k, v = (random(2, heads, 512, 64, dtype=torch.bfloat16) for heads in (8, groups, groups))
    compare(lambda form: lambda *qkv: form.windowed_attention(*qkv, scale=None, window=100), q, k, v)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_merge(temperature):
    logits = 5 * torch.randn(2, 3, 300, 40, dtype=torch.float64)
    gathered = torch.stack([blocks.statistics(*shard, temperature=temperature) for shard in logits.unbind(1)]).cuda()
    expected = blocks.merge(gathered, temperature=temperature)
    found = triton_kernels.merge(gathered, temperature=temperature)
    torch.testing.assert_close(found.token_kl, expected.token_kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-12, atol=0)
    assert torch.equal(found.peaks, expected.peaks)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_losses_and_exports_of_both_forms(tmp_path, dtype, most):
    """20 steps; weight-only, so that the export of step 0 holds nothing that went through a layer."""
    model = make_checkpoint("llama", tmp_path / "model", dtype=torch.bfloat16)
    curves, exports = [], []
    for fused in ("plain", "auto"):
        run = tmp_path / fused
        common = [f"model={model}", f"output_dir={run}", *SETTINGS, "train.steps=20", f"runtime.dtype={dtype}"]
        common += [f"runtime.fused={fused}", "quantization=nvfp4_weight_only"]
        megaqad("quantize", *common, "report.sensitivity=false")
        megaqad("export", *common, "student=ptq")
        exports.append(json.loads((run / "export/megaqad_manifest.json").read_text())["tensors"])
        megaqad("distill", *common)
        curves.append(losses(run))
    assert exports[0] == exports[1]
    print(dtype, "largest difference of a loss", float(((curves[1] - curves[0]) / curves[0]).abs().max()))
    torch.testing.assert_close(curves[1], curves[0], rtol=most, atol=0)


def test_a_step_waits_at_its_ends_only(tmp_path):
    """PyTorch says where it waits for the device."""
    from tests.distillation.test_no_waiting import batches_of, stepping

    model = make_checkpoint("llama", tmp_path / "model", dtype=torch.bfloat16)
    arguments = [f"model={model}", f"output_dir={tmp_path / 'run'}", "quantization=nvfp4", "runtime.dtype=bfloat16"]
    with stepping(arguments) as step:
        batches = [batch.to(torch.device("cuda")) for batch in batches_of()]
        step(batches)
        prepared = step._with_teacher(step._planned(batches))
        step._weight_sum = step._count(batches)[0]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                step._forward_backward(prepared)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in said if "synchroniz" in str(one.message)]
    print("waits within a step:", waits)
    assert not waits
