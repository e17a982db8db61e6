"""FP8, MXFP8, MXFP4: a readable definition, ModelOpt's bytes, ties, zeros, extremes, shards."""

import math

import pytest
import torch

from megaqad.nvfp4 import tensor_amax
from megaqad.nvfp4.reference import decode_e8m0
from megaqad.quantization.formats import FORMATS
from megaqad.quantization.numbers import e8m0_exponents, number_format

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()  # by code, so in order


def data(dtype=torch.bfloat16):
    """[64, 256]: heavy tails, blocks of zeros, ties, tiny and huge rows."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 256, generator=generator) * torch.randn(64, 1, generator=generator).exp()
    x[0] = 0
    x[1, :64] = 0
    x[2] = torch.arange(-128, 128) / 4
    x[3] = torch.arange(-128, 128) * 0.25 * 2.0**-30
    x[4] *= 1e-30
    x[5] *= 1e30
    x[6, 7] = 3e5
    return x.to(dtype)


def nearest(value, grid, down):
    """The grid's nearest magnitude with the sign of ``value``; ties to even (its place in the grid), or down."""
    size = min(abs(value), grid[-1])
    above = next(index for index, one in enumerate(grid) if one >= size)
    below = max(above - 1, 0)
    low, high = size - grid[below], grid[above] - size
    if low == high and above != below:
        index = below if down or below % 2 == 0 else above
    else:
        index = below if low < high else above
    return math.copysign(grid[index], value)


@pytest.mark.parametrize(("name", "grid", "down"), [("mxfp4", E2M1, True), ("mxfp8", E4M3, False)])
def test_microscaling_by_definition(name, grid, down):
    x = data()[:8]
    rounded = number_format(name).round_weight(x.float(), torch.tensor(1.0))
    inputs = number_format(name).round_input(x.float(), torch.tensor(1.0))
    for row in range(8):
        for block in range(8):
            values = [value.item() for value in x[row, 32 * block : 32 * block + 32].double()]
            amax = max(map(abs, values))
            scale = 2.0 ** max(-127, math.ceil(math.log2(amax / grid[-1]))) if amax else 2.0**-127
            for column, value in enumerate(values, 32 * block):
                assert rounded[row, column].item() == nearest(value / scale, grid, down) * scale
                assert inputs[row, column].item() == nearest(value / scale, grid, False) * scale


def test_fp8_by_definition():
    x = data()[6:8].float() / 100
    amax = torch.tensor(900.0)  # some saturate
    scale = (amax / 448).item()
    found = number_format("fp8").round_input(x, amax)
    for value, ours in zip(x.flatten().tolist(), found.flatten().tolist(), strict=True):
        quotient = torch.tensor(value / scale, dtype=torch.float32).item()
        assert ours == pytest.approx(nearest(quotient, E4M3, False) * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modelopt_bytes(dtype):
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor

    x = data() if dtype is torch.bfloat16 else data().clamp(-6e4, 6e4).to(dtype)
    amax = tensor_amax(x)
    theirs, exponents = MXFP4QTensor.quantize(x, 32)
    ours = number_format("mxfp4").quantize_weight(x, amax)
    assert torch.equal(ours["weight"], theirs._quantized_data)
    assert torch.equal(ours["weight_scale"], exponents.view(64, -1))
    theirs, exponents = MXFP8QTensor.quantize(x)
    ours = number_format("mxfp8").quantize_weight(x, amax)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    assert torch.equal(ours["weight_scale"], exponents)
    theirs, _ = FP8QTensor.quantize(x, amax / 448)
    ours = number_format("fp8").quantize_weight(x, amax)
    assert torch.equal(ours["weight"].view(torch.uint8), theirs._quantized_data.view(torch.uint8))


def test_exponents_next_to_powers_of_two():
    """Where log2 in float32 says a whole number for a quotient that lies above it."""
    above = torch.nextafter(torch.tensor(6.0), torch.tensor(7.0))
    blocks = torch.stack([torch.full((32,), value) for value in (6.0, above.item(), 1e-45, 3e38, 0.0)])
    exponents = e8m0_exponents(blocks, 6.0)
    assert exponents.tolist() == [127, 128, 0, 127 + 126, 0]
    assert decode_e8m0(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [2**-127, 2**-126, 1, 2.0**127]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_twice_is_rounding_once(name, dtype):
    numbers, x = number_format(name), data().to(dtype)
    amax = tensor_amax(x)
    weight = numbers.round_weight(x, amax)
    assert weight.dtype is dtype
    assert torch.equal(numbers.round_weight(weight.bfloat16().to(dtype), amax), weight) or dtype is torch.float32
    inputs = numbers.round_input(x, amax)
    assert torch.equal(numbers.round_input(inputs, amax), inputs)
    packed = numbers.quantize_weight(x.bfloat16(), amax)
    assert torch.equal(numbers.dequantize_weight(packed, dtype), numbers.round_weight(x, amax))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_whole_cut(name, ranks, dim):
    numbers, x = number_format(name), data()
    amax = tensor_amax(x)
    whole = numbers.quantize_weight(x, amax)
    parts = [numbers.quantize_weight(shard, amax) for shard in x.chunk(ranks, dim)]
    for ending, tensor in whole.items():
        if tensor.dim():
            joined = torch.cat([part[ending].view(torch.uint8) for part in parts], dim)
            assert torch.equal(joined, tensor.view(torch.uint8)), ending
        else:
            assert all(torch.equal(part[ending], tensor) for part in parts)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_the_gradient(name):
    numbers = number_format(name)
    assert not numbers.round_weight(torch.zeros(2, 64), torch.tensor(0.0)).any()
    x = data(torch.float32).requires_grad_()
    numbers.round_input(x, torch.tensor(1.0)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
