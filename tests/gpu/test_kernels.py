"""The compiled Triton kernels give the reference's bits on a real GPU; ``benchmarks/gpu.py`` has their speed."""

import pytest
import torch

from megaqad.losses import vocab_parallel_kl
from megaqad.nvfp4 import dequantize, fake_quantize, fake_quantize_packed, quantize, row_amax, tensor_amax
from tests.nvfp4 import data
from tests.nvfp4.data import DEGENERATE, DTYPES, KINDS, assert_same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *DEGENERATE])
def test_nvfp4_bits(kind, dtype):
    x = data.make(kind, dtype, 0)
    for amax in (None, tensor_amax(x) * 0.3, tensor_amax(x) * 5, row_amax(x)):
        expected = quantize(x, amax, impl="reference")
        on_gpu = x.cuda(), None if amax is None else amax.cuda()
        found = quantize(*on_gpu, impl="triton")
        values, packed = fake_quantize_packed(*on_gpu, impl="triton")
        for ours, theirs in ((found, expected), (packed, expected)):
            assert_same_bits(ours.codes.cpu(), theirs.codes)
            assert_same_bits(ours.block_scales.cpu(), theirs.block_scales)
            assert_same_bits(ours.global_scale.cpu(), theirs.global_scale)
        assert_same_bits(values.cpu(), dequantize(expected, dtype, impl="reference"))
        assert_same_bits(fake_quantize(*on_gpu, impl="triton").cpu(), values.cpu())
        assert_same_bits(dequantize(found, dtype, impl="triton").cpu(), values.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_kl_and_its_gradient(dtype, spread):
    generator = torch.Generator().manual_seed(0)
    teacher = (3 * torch.randn(64, 32_001, generator=generator)).to(dtype)
    student = (teacher.float() + spread * torch.randn(64, 32_001, generator=generator)).to(dtype)
    leaf = student.detach().cuda().requires_grad_()
    vocab_parallel_kl(leaf, teacher.cuda(), impl="triton").sum().backward()
    kl = vocab_parallel_kl(leaf.detach(), teacher.cuda(), impl="triton").double()
    exact = student.detach().cuda().double().requires_grad_()
    log_t = teacher.cuda().double().log_softmax(-1)
    true_kl = (log_t.exp() * (log_t - exact.log_softmax(-1))).sum(-1)
    true_kl.sum().backward()
    gradient, true_gradient = leaf.grad.double(), exact.grad
    assert ((kl - true_kl).abs() <= 2e-6 + 1e-6 * true_kl.detach()).all()
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    rounding = (true_gradient.to(dtype).double() - true_gradient).norm() / true_gradient.norm()
    assert error <= (1.01 * rounding if dtype is torch.bfloat16 else 3e-5)
