"""The Triton kernels divide by multiplying: the quotients are those of the division, in all bits."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.nvfp4.data import MIDPOINTS

COMPILER = next(
    (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
)
EXACTLY_AS_WRITTEN = ("-O3", "-march=native", "-ffp-contract=off", "-pthread")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [8, pytest.param(11, marks=pytest.mark.slow)])
def test_every_quotient_of_a_short_dividend(bits: int, tmp_path: Path) -> None:
    """BF16 has 8 significant bits, FP16 11: all of them, under all divisors and estimates of their reciprocals."""
    assert COMPILER is not None
    source, program = Path(__file__).with_name("division.cpp"), tmp_path / "division"
    subprocess.run([COMPILER, *EXACTLY_AS_WRITTEN, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program, str(bits)], check=True, capture_output=True, text=True).stdout
    assert said == f"0 wrong of {3 * 2**23 * 2 ** (bits - 1)}\n"


def test_quotients_of_float32_around_every_midpoint() -> None:
    """With two corrections, by the C library's fused multiply-add.

    Dividends are the few floats on both sides of ``midpoint * divisor``: the only ones where a last bit decides.
    """
    libm = ctypes.CDLL(None)
    libm.fmaf.restype = ctypes.c_float
    libm.fmaf.argtypes = [ctypes.c_float] * 3
    fma, f32 = libm.fmaf, np.float32
    rng = np.random.default_rng(0)
    smallest, largest = 2.0**-99, 448 * 2.0**127 / 2688
    exponents = rng.uniform(np.log2(smallest), np.log2(largest), 400)
    for divisor in (f32(2.0**e) for e in exponents):
        r = f32(1) / divisor
        for midpoint in MIDPOINTS:
            near = np.int64(f32(midpoint * np.float64(divisor)).view(np.int32))
            for a in (near + np.arange(-3, 4)).astype(np.int32).view(np.float32):
                q = a * r
                q = fma(fma(-divisor, q, a), r, q)
                q = fma(fma(-divisor, q, a), r, q)
                assert f32(q) == a / divisor
