"""Fused operations against the plain ones, on the CPU: PyTorch's own kernels, and ours in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from megaqad.models.operations import PLAIN, Fused, operations
from megaqad.models.rotary_kernel import rotate


def both(run, *inputs: Tensor, seed: int = 0) -> list[Tensor]:
    """The result and the gradients of the inputs that have one."""
    leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in inputs]
    result = run(*leaves)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream, allow_unused=True)]


@pytest.mark.parametrize("order", ["cast_first", "weight_first"])
def test_rms_norm(order: str) -> None:
    x, weight = torch.randn(5, 3, 96), torch.randn(96)
    plain, fused = (
        both(lambda x, w, form=form: form.rms_norm(x, w, 1e-5, order), x, weight) for form in (PLAIN, Fused())
    )
    for ours, oracle in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)


def tables(length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length).float(), 1 / 100 ** (torch.arange(0, dim, 2) / dim))
    whole = torch.cat((angles, angles), -1)[:, None, None, :]
    return whole.cos().to(dtype), whole.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim", "rotated"), [(9, 64, 64), (1, 24, 24), (3, 40, 12), (16, 128, 64)])
def test_rotary_kernel(heads: int, dim: int, rotated: int, dtype: torch.dtype) -> None:
    """Of a part of a wider tensor, as keys are; the gradient too."""
    wide = torch.randn(7, 2, heads, dim + 16)
    cos, sin = tables(7, rotated, dtype)
    exact = both(lambda x: PLAIN.rotate(x[..., 8 : 8 + dim], cos.float(), sin.float()), wide.to(dtype).float())
    found = both(lambda x: rotate(x[..., 8 : 8 + dim], cos, sin), wide.to(dtype))
    tolerance = 1e-6 if dtype is torch.float32 else 2**-7  # the interpreter cuts off where a GPU rounds
    for ours, oracle in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.float(), oracle, rtol=tolerance, atol=tolerance)
    assert found[0].is_contiguous()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu2"])
def test_gated(activation: str) -> None:
    """Megatron-Core's, which it compiles."""
    inner = torch.randn(6, 2, 64)
    plain, fused = (both(lambda x, form=form: form.gated(x, activation), inner) for form in (PLAIN, Fused()))
    for ours, oracle in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-5)


def test_the_cpu_computes_plainly() -> None:
    assert operations("auto", torch.device("cpu")) is operations("plain", torch.device("cuda")) is PLAIN
    assert isinstance(operations("auto", torch.device("cuda")), Fused)
