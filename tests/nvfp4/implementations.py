"""The implementations under test, as pytest parameters; one that cannot run here skips and says why."""

import importlib.util

import pytest
import torch

from megaqad.nvfp4 import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TRITON_IS_MISSING = importlib.util.find_spec("triton") is None

TRITON = pytest.param("triton", marks=pytest.mark.skipif(TRITON_IS_MISSING, reason="triton is not installed"))
WITHOUT_COMPILER = native.unavailable() if DEVICE.type == "cpu" else "the tensors are on the GPU"
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(WITHOUT_COMPILER is not None, reason=f"impl='native': {WITHOUT_COMPILER}")
)
FAST = ("torch", NATIVE, TRITON)
ALL = ("reference", *FAST)
