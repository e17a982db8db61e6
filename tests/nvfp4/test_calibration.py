"""The scales that ``mse`` and ``four_over_six`` choose are the best, and what ``quantize`` then makes of them."""

import pytest
import torch

from megaqad.nvfp4 import (
    METHODS,
    choose_scales,
    dequantize,
    native,
    quantize,
    reference,
    row_amax,
    tensor_amax,
    vectorized,
)
from megaqad.nvfp4.reference import decode_e2m1, encode_e2m1
from tests.nvfp4 import data
from tests.nvfp4.data import assert_same_bits
from tests.nvfp4.implementations import ALL, DEVICE, FAST, WITHOUT_COMPILER

# Numbers that overflow on purpose make NumPy, which runs Triton's interpreter, warn.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def weights(kind, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(48, 128, generator=generator)
    if kind == "heavy":
        x = x / torch.randn(48, 128, generator=generator).abs().clamp_min(1e-3)
    if kind == "wide":  # block scales from E4M3's subnormals to its largest
        x = x * torch.logspace(-6, 2, 48).unsqueeze(-1)
    if kind == "few":  # many exact ties between scales
        x = torch.randint(-3, 4, (48, 128), generator=generator) * 0.25
    x[5, 16:48] = 0
    return x.to(dtype)


KINDS = ["normal", "heavy", "wide", "few"]


def block_errors(x, q):
    return (dequantize(q, torch.float32) - x.float()).square().unflatten(-1, (-1, 16)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_fast_choice_is_the_reference_s(method, kind, dtype):
    """Of ``mse`` the whole sweep's; in all bits, for any number of blocks."""
    x = weights(kind, dtype)
    for part in (x, x[:3, :16], x[:9, :48]):
        expected = choose_scales(part, tensor_amax(x), method, impl="reference")
        for impl in ("torch",) if WITHOUT_COMPILER else ("torch", "native"):
            found = choose_scales(part, tensor_amax(x), method, impl=impl)
            assert_same_bits(found[0], expected[0])
            assert_same_bits(found[1], expected[1])


@pytest.mark.skipif(WITHOUT_COMPILER is not None, reason=str(WITHOUT_COMPILER))
@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*data.KINDS, *data.DEGENERATE])
def test_squared_errors_in_all_bits(kind, dtype):
    blocks = data.make(kind, dtype).view(-1, 16)[:951].contiguous()
    scales = blocks.float().abs().amax(-1).clamp_min(2.0**-100) / torch.linspace(2.0, 9.0, len(blocks))
    for implementation in (vectorized, native):
        assert_same_bits(implementation.squared_errors(blocks, scales), reference.squared_errors(blocks, scales))


@pytest.mark.parametrize("kind", KINDS)
def test_no_e4m3_scale_is_better(kind):
    x = weights(kind)
    amax, block_amax = choose_scales(x, tensor_amax(x), "mse")
    q = quantize(x, amax, block_amax=block_amax, impl="reference")
    found = block_errors(x.double(), q)
    blocks = x.float().unflatten(-1, (-1, 16))
    for code in range(1, 127):
        scale = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * q.global_scale
        other = (decode_e2m1(encode_e2m1(blocks / scale)) * scale - blocks).double().square().sum(-1)
        assert (found <= other * (1 + 1e-6)).all(), code


@pytest.mark.parametrize("kind", KINDS)
def test_four_over_six_takes_the_better_of_two(kind):
    """Against a plain reading of the paper: global scale amax / (6 * 256), block scale from amax / 6 or amax / 4."""
    x = weights(kind)
    amax, block_amax = choose_scales(x, tensor_amax(x), "four_over_six")
    q = quantize(x, amax, block_amax=block_amax)
    assert q.global_scale == tensor_amax(x) / (6 * 256)
    blocks = x.float().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    scales, errors = [], []
    for target in (6, 4):
        scale = (largest / target / q.global_scale).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        step = (scale.float() * q.global_scale).unsqueeze(-1)
        scales.append(scale)
        errors.append((decode_e2m1(encode_e2m1(blocks / step)) * step - blocks).square().sum(-1))
    four = (errors[1] < errors[0] * (1 - 1e-6)) & (largest > 0)
    six = (errors[1] > errors[0] * (1 + 1e-6)) & (largest > 0)
    assert four.any() or kind == "few"
    assert six.any() or kind == "few"
    assert torch.equal(q.block_scales[four].float(), scales[1][four].float())
    assert torch.equal(q.block_scales[six].float(), scales[0][six].float())
    assert (q.block_scales[largest == 0].float() == 1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_the_choice(method, dim):
    x = weights("normal")
    amax, whole = choose_scales(x, tensor_amax(x), method)
    parts = [choose_scales(part, tensor_amax(x), method) for part in x.chunk(2, dim)]
    assert all(torch.equal(part[0], amax) for part in parts)
    assert torch.equal(torch.cat([part[1] for part in parts], dim), whole)


@pytest.mark.parametrize("impl", ALL)
def test_max_is_what_quantize_does_by_itself(impl):
    x = weights("heavy").to(DEVICE)
    amax, block_amax = choose_scales(x, tensor_amax(x), "max")
    chosen, plain = quantize(x, amax, block_amax=block_amax, impl=impl), quantize(x, impl=impl)
    assert torch.equal(chosen.codes, plain.codes)
    assert torch.equal(chosen.block_scales.view(torch.uint8), plain.block_scales.view(torch.uint8))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_any_block_amax_gives_the_reference_s_bytes(kind, impl, per_row):
    """Chosen by a method, or none that a method would choose: learned ones may be anything, even negative."""
    x = weights(kind).to(DEVICE)
    amax = row_amax(x) if per_row else tensor_amax(x) * 0.7
    _, block_amax = choose_scales(x, tensor_amax(x), "four_over_six")
    noise = torch.randn(block_amax.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    odd = noise * 10 ** (6 * noise.sin())
    odd[7] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, 3e-39, float("inf")], device=DEVICE)
    for chosen in (block_amax, odd, odd.t().contiguous().t()):
        ours, expected = (quantize(x, amax, block_amax=chosen, impl=each) for each in (impl, "reference"))
        assert_same_bits(ours.codes, expected.codes)
        assert_same_bits(ours.block_scales, expected.block_scales)
        assert_same_bits(ours.global_scale, expected.global_scale)


def test_errors_shrink():
    x = weights("normal")
    totals = {}
    for method in METHODS:
        amax, block_amax = choose_scales(x, tensor_amax(x), method)
        totals[method] = block_errors(x, quantize(x, amax, block_amax=block_amax)).sum()
    assert totals["mse"] < totals["four_over_six"] < totals["max"]


def test_bad_input():
    x = weights("normal")
    with pytest.raises(ValueError, match="one of max, mse"):
        choose_scales(x, tensor_amax(x), "least")
    with pytest.raises(ValueError, match="one value per block"):
        quantize(x, tensor_amax(x), block_amax=torch.ones(3))
