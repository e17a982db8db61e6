"""The implementations under test, as pytest parameters; one that cannot run here skips and says why."""

import importlib.util

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TRITON_IS_MISSING = importlib.util.find_spec("triton") is None

TRITON = pytest.param("triton", marks=pytest.mark.skipif(TRITON_IS_MISSING, reason="triton is not installed"))
FAST = ("torch", TRITON)
ALL = ("reference", *FAST)
