"""The compiled implementation as a guest: threads, odd sizes and places, and machines that cannot compile it."""

from pathlib import Path

import pytest
import torch

from megaqad.nvfp4 import NVFP4Tensor, native, quantize, reference, row_amax
from tests.nvfp4 import data
from tests.nvfp4.data import DTYPES, assert_same_bits
from tests.nvfp4.implementations import WITHOUT_COMPILER, run_python

needs_compiler = pytest.mark.skipif(WITHOUT_COMPILER is not None, reason=str(WITHOUT_COMPILER))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert_same_bits(a.codes, b.codes)
    assert_same_bits(a.block_scales, b.block_scales)
    assert_same_bits(a.global_scale, b.global_scale)


@needs_compiler
@dtypes
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 15, 16, 17, 24, 33])
def test_every_number_of_blocks_and_rows(blocks, dtype):
    """Groups of sixteen blocks cross rows, end within one, and leave a rest."""
    flat = data.make("student_t2", dtype).flatten()
    for rows in (1, 2, 3, 16):
        x = flat[: rows * blocks * 16].view(rows, blocks * 16)
        for amax in (None, row_amax(x)):
            expected = reference.quantize(x, amax)
            values, packed = native.run(x, amax, want_values=True, want_codes=True)
            assert_same(packed, expected)
            assert_same_bits(values, reference.dequantize(expected, dtype))
            assert_same_bits(native.dequantize(expected, dtype), values)
            chosen = torch.rand(rows, blocks) * 3
            one = torch.ones(())
            assert_same(quantize(x, one, block_amax=chosen, impl="native"), reference.quantize(x, one, chosen))


@needs_compiler
@dtypes
def test_a_view_that_begins_anywhere(dtype):
    """No address is assumed to be aligned, of any tensor."""
    storage = torch.zeros(4096 + 1, dtype=dtype)
    x = storage[1:].view(16, 256).copy_(data.make("normal", dtype).flatten()[:4096].view(16, 256))
    q = reference.quantize(x, None)
    assert_same(quantize(x, impl="native"), q)
    moved = [
        torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t) for t in (q.codes, q.block_scales.view(torch.uint8))
    ]
    shifted = NVFP4Tensor(moved[0], moved[1].view(torch.float8_e4m3fn), q.global_scale)
    assert_same_bits(native.dequantize(shifted, dtype), reference.dequantize(q, dtype))


@needs_compiler
@dtypes
def test_every_byte_and_scale_dequantizes(dtype):
    """All 256 bytes under all 256 E4M3 scales, negative ones and NaN included, which no quantizer writes."""
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(32).view(torch.float8_e4m3fn)
    codes = torch.arange(256, dtype=torch.uint8).repeat(256)
    for global_scale in (1.0, 0.37, 2.0**-100, 1e30):
        q = NVFP4Tensor(codes, scales, torch.tensor(global_scale))
        ours, expected = native.dequantize(q, dtype), reference.dequantize(q, dtype)
        nan = torch.isnan(expected)
        assert torch.equal(torch.isnan(ours), nan)
        assert_same_bits(ours[~nan], expected[~nan])


@needs_compiler
@dtypes
def test_nan_of_any_payload_stays_nan(dtype):
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    payloads = [torch.iinfo(bits).max, -1, torch.tensor(torch.nan, dtype=dtype).view(bits).item()]
    for payload in payloads:
        x = torch.ones(2, 256, dtype=dtype)
        x.view(bits)[0, 17] = payload
        values, packed = native.run(x, torch.ones(()), want_values=True, want_codes=True)
        assert_same(packed, reference.quantize(x, torch.ones(())))
        assert torch.isnan(values).nonzero()[:, 1].tolist() == list(range(16, 32))


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    x = torch.randn(512, 304, generator=torch.Generator().manual_seed(0)).bfloat16()
    amax = row_amax(x)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((*native.run(x, amax, want_values=True, want_codes=True), row_amax(x)))
    torch.set_num_threads(before)
    for values, packed, maxima in results[1:]:
        assert_same_bits(values, results[0][0])
        assert_same(packed, results[0][1])
        assert_same_bits(maxima, amax)


TRY = """
    import logging
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=__import__("sys").stdout)
    import torch
    from megaqad.nvfp4 import fake_quantize, quantize, row_amax
    x = torch.arange(32.0).view(2, 16)
    for _ in range(2):
        print(quantize(x).codes.tolist() == quantize(x, impl="reference").codes.tolist(), row_amax(x).tolist())
    try:
        quantize(x, impl="native")
        print("compiled")
    except ValueError as error:
        print(error)
"""


def test_without_a_compiler_auto_takes_pytorch_and_says_so_once(tmp_path: Path):
    lines = run_python(TRY, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path)).splitlines()
    reason = "no C++ compiler (set CXX, or install g++)"
    assert lines == [
        f"NVFP4 on the CPU uses the slower PyTorch implementation: {reason}",
        "True [[15.0], [31.0]]",
        "True [[15.0], [31.0]]",
        f"impl='native' cannot run: {reason}; use impl='auto'",
    ]


def test_a_compiler_that_fails_is_named(tmp_path: Path):
    lines = run_python(TRY, CXX="false", XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert "cannot compile native.cpp" in lines[-1]


@needs_compiler
def test_with_a_compiler_auto_is_silent(tmp_path: Path):
    lines = run_python(TRY).splitlines()
    assert lines == ["True [[15.0], [31.0]]", "True [[15.0], [31.0]]", "compiled"]
