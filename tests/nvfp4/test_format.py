"""The definition, case by case, with expected bytes worked out by hand."""

import re

import pytest
import torch

from megaqad.nvfp4 import (
    NVFP4Tensor,
    check_finite,
    dequantize,
    fake_quantize,
    global_scale_from_amax,
    quantize,
    tensor_amax,
)
from megaqad.nvfp4.format import E2M1_VALUES, MIN_GLOBAL_SCALE
from tests.nvfp4 import data
from tests.nvfp4.data import DTYPES, MIDPOINTS
from tests.nvfp4.implementations import ALL, DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

ONE = torch.tensor(2688.0, device=DEVICE)
"""The amax whose global scale is exactly 1."""

impls = pytest.mark.parametrize("impl", ALL)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def one_block(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1, 16] with the given values first, zeros after."""
    x = torch.zeros(1, 16, dtype=dtype, device=DEVICE)
    x[0, : len(values)] = torch.tensor(values, dtype=dtype)
    return x


def codes(q: NVFP4Tensor) -> list[int]:
    return torch.stack((q.codes & 0xF, q.codes >> 4), -1).flatten().tolist()


def scale_bytes(q: NVFP4Tensor) -> list[int]:
    return q.block_scales.view(torch.uint8).flatten().tolist()


@impls
@dtypes
def test_grid_values_keep_their_codes_low_nibble_first(impl, dtype):
    x = one_block(*E2M1_VALUES, *(-v for v in E2M1_VALUES[1:]), dtype=dtype)
    q = quantize(x, ONE, impl=impl)
    assert scale_bytes(q) == [0x38]
    assert codes(q) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]
    assert q.codes.tolist() == [[0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]]
    data.assert_same_bits(dequantize(q, dtype, impl=impl), x)


@impls
@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_even_mantissa(impl, dtype, sign):
    q = quantize(one_block(6.0, *(sign * m for m in MIDPOINTS), dtype=dtype), ONE, impl=impl)
    bit = 0 if sign > 0 else 8
    assert codes(q)[1:8] == [code + bit for code in (0, 2, 2, 4, 4, 6, 6)]


@impls
@pytest.mark.parametrize("midpoint", MIDPOINTS)
def test_the_float32_beside_a_midpoint_goes_to_its_own_side(impl, midpoint):
    t = torch.tensor(midpoint)
    below, above = (torch.nextafter(t, torch.tensor(toward)).item() for toward in (0.0, 9.0))
    code = MIDPOINTS.index(midpoint)
    got = codes(quantize(one_block(6.0, below, above, -below, -above), ONE, impl=impl))
    assert got[1:5] == [code, code + 1, code + 8, code + 9]


@impls
@dtypes
def test_minus_zero_is_zero_and_a_small_negative_is_code_8(impl, dtype):
    x = one_block(6.0, -0.0, -0.01, 0.01, dtype=dtype)
    q = quantize(x, ONE, impl=impl)
    assert codes(q)[1:4] == [0, 8, 0]
    data.assert_same_bits(fake_quantize(x, ONE, impl=impl), one_block(6.0, dtype=dtype))


@impls
@dtypes
def test_zero_block_has_scale_one(impl, dtype):
    x = torch.cat((one_block(dtype=dtype), one_block(3.0, dtype=dtype)), dim=1)
    q = quantize(x, impl=impl)
    assert scale_bytes(q) == [0x38, 0x7E]
    assert codes(q)[:16] == [0] * 16
    data.assert_same_bits(dequantize(q, dtype, impl=impl), x)


@impls
@dtypes
@pytest.mark.parametrize("kind", ["all_zero", "all_minus_zero"])
def test_zero_tensor_has_zero_codes_and_the_smallest_global_scale(impl, dtype, kind):
    x = data.make(kind, dtype).to(DEVICE)
    q = quantize(x, impl=impl)
    assert q.global_scale.item() == MIN_GLOBAL_SCALE
    assert not q.codes.any()
    assert set(scale_bytes(q)) == {0x38}
    data.assert_same_bits(fake_quantize(x, impl=impl), torch.zeros_like(x))


@impls
@pytest.mark.parametrize(
    ("scale", "byte"),
    [
        (2.0**-9, 0x01),  # the smallest block scale
        (1.5 * 2.0**-9, 0x02),  # a tie between the first two
        (2.0**-10, 0x01),  # would be 0: held up
        (2.0**-10 * (1 + 2.0**-20), 0x01),
        (2.0**-11, 0x01),
        (17.0, 0x58),  # a tie between 16 and 18
        (19.0, 0x5A),  # a tie between 18 and 20
        (448.0, 0x7E),
    ],
)
def test_block_scale_rounds_to_even_and_never_to_zero(impl, scale, byte):
    q = quantize(one_block(6 * scale), ONE, impl=impl)
    assert scale_bytes(q) == [byte]


@impls
@dtypes
def test_values_beyond_a_given_amax_saturate(impl, dtype):
    amax = torch.tensor(1.0, device=DEVICE)
    x = one_block(1.0, 0.5, 4.0, -40.0, dtype=dtype)
    q = quantize(x, amax, impl=impl)
    assert scale_bytes(q) == [0x7E]
    assert codes(q)[:4] == [7, 5, 7, 15]
    data.assert_same_bits(fake_quantize(x, amax, impl=impl), one_block(1.0, 0.5, 1.0, -1.0, dtype=dtype))


@impls
@dtypes
def test_infinity_saturates_under_a_given_amax(impl, dtype):
    q = quantize(one_block(float("inf"), float("-inf"), 1.0, dtype=dtype), ONE, impl=impl)
    assert scale_bytes(q) == [0x7E]
    assert codes(q)[:3] == [7, 15, 0]


@impls
@dtypes
def test_infinity_without_an_amax_spoils_the_tensor(impl, dtype):
    x = torch.ones(2, 32, dtype=dtype, device=DEVICE)
    x[0, 3] = float("inf")
    assert torch.isnan(fake_quantize(x, impl=impl)).all()


@impls
@dtypes
def test_nan_spoils_its_block_and_no_other(impl, dtype):
    x = torch.ones(2, 32, dtype=dtype, device=DEVICE)
    x[0, 3] = float("nan")
    q = quantize(x, ONE, impl=impl)
    assert [byte == 0x7F for byte in scale_bytes(q)] == [True, False, False, False]
    spoiled = torch.isnan(dequantize(q, dtype, impl=impl))
    assert spoiled[0, :16].all()
    assert int(spoiled.sum()) == 16
    assert torch.equal(torch.isnan(fake_quantize(x, ONE, impl=impl)), spoiled)


@dtypes
def test_check_finite_names_the_tensor_and_counts(dtype):
    x = torch.ones(4, 16, dtype=dtype, device=DEVICE)
    check_finite(x, "model.layers.0.mlp.up_proj.weight")
    check_finite(x[:0], "no rows")
    x[1, 2], x[2, 3], x[3, 4] = float("nan"), float("inf"), float("-inf")
    message = "model.layers.0.mlp.up_proj.weight [4, 16] holds 1 NaN and 2 Inf values"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_finite(x, "model.layers.0.mlp.up_proj.weight")


@impls
@pytest.mark.parametrize("kind", data.DEGENERATE)
@dtypes
def test_the_floor_keeps_degenerate_tensors_finite(impl, kind, dtype):
    x = data.make(kind, dtype).to(DEVICE)
    q = quantize(x, impl=impl)
    assert q.global_scale.item() == MIN_GLOBAL_SCALE
    assert torch.isfinite(1 / (q.block_scales.float() * q.global_scale)).all()
    assert torch.isfinite(fake_quantize(x, impl=impl)).all()


def test_global_scale_is_the_correctly_rounded_quotient():
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 3
    expected = (amax.double() / 2688).float()  # float64 holds the quotient to more than twice float32's precision
    data.assert_same_bits(global_scale_from_amax(amax), expected)
    assert (amax * torch.tensor(1 / 2688)).ne(expected).any(), "the sample must tell division from multiplication"


@dtypes
def test_tensor_amax(dtype):
    x = torch.tensor([[1.0, -3.0], [2.0, -0.0]], dtype=dtype, device=DEVICE)
    assert tensor_amax(x).item() == 3.0
    assert tensor_amax(x).dtype == torch.float32
    assert tensor_amax(x).shape == ()
    assert tensor_amax(x[:0]).item() == 0.0
    assert torch.isnan(tensor_amax(torch.tensor([1.0, float("nan")], dtype=dtype)))


def test_layout_and_size():
    q = quantize(torch.randn(5, 3, 64, device=DEVICE))
    assert q.codes.shape == (5, 3, 32)
    assert q.codes.dtype == torch.uint8
    assert q.block_scales.shape == (5, 3, 4)
    assert q.block_scales.dtype == torch.float8_e4m3fn
    assert q.global_scale.shape == ()
    assert q.global_scale.dtype == torch.float32
    assert q.shape == (5, 3, 64)
    assert q.nbytes == 5 * 3 * 64 * 9 // 16 + 4


@impls
@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_misfits_are_refused(impl, function):
    for shape in ((4, 24), (4, 8), ()):
        with pytest.raises(ValueError, match=re.escape(f"divisible by 16, not shape {list(shape)}")):
            function(torch.ones(shape), impl=impl)
    with pytest.raises(ValueError, match=r"not torch\.int32"):
        function(torch.ones(4, 16, dtype=torch.int32), impl=impl)
    for amax in (torch.ones(1), torch.ones((), dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="amax must be a float32 tensor of shape"):
            function(torch.ones(4, 16), amax, impl=impl)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="impl must be one of auto, reference, torch, native, triton, not 'fast'"):
        quantize(torch.ones(4, 16), impl="fast")
