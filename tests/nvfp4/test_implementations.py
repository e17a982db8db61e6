"""Every implementation gives the reference's bits, and the reference has what training and export rely on."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megaqad.nvfp4 import (
    NVFP4Tensor,
    dequantize,
    fake_quantize,
    fake_quantize_packed,
    quantize,
    row_amax,
    tensor_amax,
    vectorized,
)
from tests.nvfp4 import data
from tests.nvfp4.data import DEGENERATE, DTYPES, KINDS, assert_same_bits
from tests.nvfp4.implementations import ALL, DEVICE, FAST

# Numbers that overflow on purpose make NumPy, which runs Triton's interpreter, warn.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

kinds = pytest.mark.parametrize("kind", [*KINDS, *DEGENERATE])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(kind: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return data.make(kind, dtype, seed).to(DEVICE)


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert_same_bits(a.codes, b.codes)
    assert_same_bits(a.block_scales, b.block_scales)
    assert_same_bits(a.global_scale, b.global_scale)


@dataclass(frozen=True)
class Case:
    """A tensor under one amax, and what the reference makes of it."""

    x: torch.Tensor
    amax: torch.Tensor | None
    quantized: NVFP4Tensor
    values: dict[torch.dtype, torch.Tensor]


@functools.cache
def cases(kind: str, dtype: torch.dtype) -> list[Case]:
    """Under no amax, one that saturates, rows' own, rows' that saturate; the tensor's own; a larger sibling's."""
    x = make(kind, dtype)
    own, rows = tensor_amax(x), row_amax(x, impl="reference")
    found = []
    for amax in (None, own * 0.3, rows, rows * 0.3, own, own * 5):
        q = quantize(x, amax, impl="reference")
        found.append(Case(x, amax, q, {out: dequantize(q, out, impl="reference") for out in DTYPES}))
    return found


@pytest.mark.parametrize("impl", FAST)
@dtypes
@kinds
def test_same_bits_as_the_reference(impl, dtype, kind):
    for case in cases(kind, dtype)[: 4 if impl == "triton" else None]:  # its interpreter is slow
        assert_same(quantize(case.x, case.amax, impl=impl), case.quantized)
        values, packed = fake_quantize_packed(case.x, case.amax, impl=impl)
        assert_same(packed, case.quantized)
        for found in (values, fake_quantize(case.x, case.amax, impl=impl)):
            assert_same_bits(found, case.values[dtype])
        for out_dtype, expected in case.values.items():
            assert_same_bits(dequantize(case.quantized, out_dtype, impl=impl), expected)


@dtypes
@kinds
def test_fake_quantize_is_the_round_trip(dtype, kind):
    for case in cases(kind, dtype):
        values, packed = fake_quantize_packed(case.x, case.amax, impl="reference")
        assert_same(packed, case.quantized)
        assert_same_bits(values, case.values[dtype])
        assert_same_bits(fake_quantize(case.x, case.amax, impl="reference"), values)


@pytest.mark.parametrize("impl", FAST)
def test_all_bfloat16_numbers(impl):
    """Every BF16 bit pattern but NaN and Inf, in random company, under an amax of 1: all magnitudes, both signs."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].view(-1, 16).to(DEVICE)
    amax = torch.ones((), device=DEVICE)
    assert_same(quantize(x, amax, impl=impl), quantize(x, amax, impl="reference"))
    assert_same_bits(fake_quantize(x, amax, impl=impl), fake_quantize(x, amax, impl="reference"))


@pytest.mark.parametrize("impl", ALL)
@dtypes
def test_any_shape_and_strides(impl, dtype):
    x = make("normal", dtype)
    whole = quantize(x, impl=impl)
    assert_same(quantize(x.t().contiguous().t(), impl=impl), whole)
    folded = quantize(x.view(4, 24, 10, 16), impl=impl)
    assert folded.codes.shape == (4, 24, 10, 8)
    assert folded.block_scales.shape == (4, 24, 10, 1)
    assert_same_bits(folded.codes.view_as(whole.codes), whole.codes)
    rows = row_amax(x)
    values = fake_quantize(x.view(8, 12, -1), rows.view(8, 12, 1), impl=impl)
    assert_same_bits(values.view_as(x), fake_quantize(x, rows, impl=impl))
    assert quantize(x[0], impl=impl).codes.shape == (80,)
    q = quantize(x[:0], impl=impl)
    assert q.codes.shape == (0, 80)
    assert q.block_scales.shape == (0, 10)
    assert dequantize(q, dtype, impl=impl).shape == (0, 160)
    assert fake_quantize(x[:0], impl=impl).shape == (0, 160)


@pytest.mark.parametrize("blocks", [1, 3, 959, 961])
def test_pieces_meet_without_a_seam(monkeypatch, blocks):
    monkeypatch.setattr(vectorized, "_BLOCKS_PER_THREAD", blocks)
    monkeypatch.setattr(vectorized, "_BLOCKS_PER_LAUNCH", blocks)
    x = make("student_t2", torch.bfloat16)
    expected = quantize(x, impl="reference")
    assert_same(quantize(x, impl="torch"), expected)
    values, packed = fake_quantize_packed(x, impl="torch")
    assert_same(packed, expected)
    assert_same_bits(values, dequantize(expected, impl="reference"))
    assert_same_bits(dequantize(expected, impl="torch"), values)


@dtypes
@kinds
def test_a_second_trip_changes_nothing(dtype, kind):
    """Idempotent under the first trip's amax, but for blocks whose scale is twice the smallest.

    There an amax between 4.5 and 5 times the scale rounds down to 4 times, for which the smallest scale fits better;
    everywhere else the largest element of a block is stored as 6 and asks for the same scale again.
    """
    case = cases(kind, dtype)[4]
    assert case.amax is not None
    settled = (case.quantized.block_scales.view(torch.uint8) != 0x02).repeat_interleave(16, -1)
    once = case.values[dtype]
    twice = fake_quantize(once, case.amax, impl="reference")
    assert_same_bits(torch.where(settled, twice, 0), torch.where(settled, once, 0))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("kind", ["normal", "weights", "student_t2", "zero_blocks", "grid_and_midpoints"])
def test_quantizing_an_exported_tensor_gives_its_own_bytes(impl, kind):
    """The amax found anew in BF16 values is the one they were made with; minus zero comes back as zero."""
    q = quantize(make(kind, torch.bfloat16), impl=impl)
    again = quantize(dequantize(q, torch.bfloat16, impl=impl), impl=impl)
    assert_same_bits(again.global_scale, q.global_scale)
    assert_same_bits(again.block_scales, q.block_scales)
    low, high = q.codes & 0xF, q.codes >> 4
    folded = torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4
    assert_same_bits(again.codes, folded)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dim", [0, 1], ids=["column_parallel", "row_parallel"])
@dtypes
def test_shards_concatenate_to_the_whole(impl, dim, dtype):
    x = torch.randn(64, 8 * 48, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    whole = quantize(x, impl=impl)
    shards = x.chunk(8, dim)
    assert shards[0].shape[1] % 16 == 0
    amax = torch.stack([tensor_amax(shard) for shard in shards]).amax()  # what an all-reduce gives every rank
    pieces = [quantize(shard, amax, impl=impl) for shard in shards]
    assert_same_bits(torch.cat([p.codes for p in pieces], dim), whole.codes)
    scales = torch.cat([p.block_scales.view(torch.uint8) for p in pieces], dim)
    assert_same_bits(scales.view(torch.float8_e4m3fn), whole.block_scales)
    assert_same_bits(pieces[0].global_scale, whole.global_scale)
    values = torch.cat([fake_quantize(shard, amax, impl=impl) for shard in shards], dim)
    assert_same_bits(values, fake_quantize(x, impl=impl))


@dtypes
@kinds
def test_rows_with_scales_of_their_own(dtype, kind):
    """Each row as if it were a tensor alone, with its own amax or a given one."""
    for case in cases(kind, dtype)[2:4]:
        assert case.amax is not None
        whole = case.quantized
        assert whole.global_scale.shape == (len(case.x), 1)
        for number in range(0, len(case.x), 8):
            row = quantize(case.x[number], case.amax[number].reshape(()), impl="reference")
            assert_same(
                NVFP4Tensor(whole.codes[number], whole.block_scales[number], whole.global_scale[number, 0]), row
            )
            assert_same_bits(case.values[dtype][number], dequantize(row, dtype, impl="reference"))


@pytest.mark.parametrize("impl", ALL)
@dtypes
@pytest.mark.parametrize("kind", ["normal", "huge", "subnormals", "minus_zeros", "all_minus_zero"])
def test_row_amax_is_each_row_s(impl, dtype, kind):
    some = make(kind, dtype)[:24]
    for x in (some, some[:, :16].t(), some[:9, :7], some[:0]):
        assert_same_bits(row_amax(x, impl=impl), x.float().abs().amax(-1, keepdim=True))
    x = some.clone()
    x[3, 5], x[4, 6] = float("nan"), float("-inf")
    assert torch.isnan(row_amax(x, impl=impl)).flatten().nonzero().tolist() == [[3]]
    assert torch.isposinf(row_amax(x, impl=impl)).flatten().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("impl", ALL)
def test_fused_siblings_share_a_global_scale_at_little_cost(impl):
    """q, k and v at amax ratios 1 : 1/2 : 1/4 under the largest amax: one global scale, about 9.5 % error each."""
    q, k, v = (make("weights", torch.bfloat16, seed) * ratio for seed, ratio in ((0, 1.0), (1, 0.5), (2, 0.25)))
    amax = torch.stack([tensor_amax(w) for w in (q, k, v)]).amax()
    for w in (q, k, v):
        error = (fake_quantize(w, amax, impl=impl).float() - w.float()).norm() / w.float().norm()
        assert 0.085 < error < 0.105


@pytest.mark.parametrize("impl", ALL)
@dtypes
def test_gradient_passes_straight_through(impl, dtype):
    x = make("student_t2", dtype).requires_grad_()
    saturating = tensor_amax(x) * 0.01
    y = fake_quantize(x, saturating, impl=impl)
    assert_same_bits(y.detach(), fake_quantize(x.detach(), saturating, impl=impl))
    upstream = make("normal", dtype, seed=5)
    y.backward(upstream)
    assert x.grad is not None
    assert_same_bits(x.grad, upstream)


@pytest.mark.parametrize("impl", ALL)
def test_nothing_is_differentiable_but_fake_quantize(impl):
    x = make("normal", torch.float32).requires_grad_()
    values, packed = fake_quantize_packed(x, impl=impl)
    assert not values.requires_grad
    assert not packed.global_scale.requires_grad
    assert not quantize(x, impl=impl).global_scale.requires_grad
    with torch.no_grad():
        assert not fake_quantize(x, impl=impl).requires_grad


@pytest.mark.parametrize("impl", ALL)
def test_an_amax_that_requires_grad_is_only_read(impl):
    x = make("normal", torch.float32)
    amax = tensor_amax(x).requires_grad_()
    y = fake_quantize(x, amax, impl=impl)
    assert not y.requires_grad
    assert_same_bits(y, fake_quantize(x, impl=impl))


@pytest.mark.parametrize("impl", ALL)
def test_the_default_dtype_does_not_matter(impl):
    """Model builders set it to BF16 while they load weights."""
    x = make("weights", torch.bfloat16)
    values, packed = fake_quantize_packed(x, impl=impl)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same_bits(fake_quantize(x, impl=impl), values)
        assert_same(quantize(x, impl=impl), packed)
        assert_same_bits(dequantize(packed, impl=impl), values)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("impl", ALL)
def test_values_are_dense_whatever_the_strides_of_the_input(impl):
    """A dimension of one may have any stride, and the product of a layer may round otherwise for another."""
    x = make("normal", torch.float32)[:16, :64].contiguous().as_strided((16, 1, 64), (64, 1024, 1))
    assert x.is_contiguous()
    for values in (fake_quantize(x, impl=impl), fake_quantize_packed(x, impl=impl)[0]):
        assert values.stride() == (64, 64, 1)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_nothing_waits_for_the_device(impl):
    """Tensors without data can be quantized, so no step reads a value on the host."""
    with FakeTensorMode():
        x = torch.empty(96, 160, dtype=torch.bfloat16)
        values, packed = fake_quantize_packed(x, impl=impl)
        assert values.shape == dequantize(packed, impl=impl).shape == fake_quantize(x, impl=impl).shape
        assert quantize(x, tensor_amax(x), impl=impl).codes.shape == (96, 80)
