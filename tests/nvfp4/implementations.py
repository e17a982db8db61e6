"""The implementations under test, as pytest parameters; one that cannot run here skips and says why."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from megaqad.nvfp4 import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TRITON_IS_MISSING = importlib.util.find_spec("triton") is None

TRITON = pytest.param("triton", marks=pytest.mark.skipif(TRITON_IS_MISSING, reason="triton is not installed"))
WITHOUT_COMPILER = native.unavailable()
_NOT_NATIVE = WITHOUT_COMPILER if DEVICE.type == "cpu" else "the tensors are on the GPU"
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(_NOT_NATIVE is not None, reason=f"impl='native': {_NOT_NATIVE}")
)
FAST = ("torch", NATIVE, TRITON)
ALL = ("reference", *FAST)


def run_python(program: str, **environment: str | None) -> str:
    """Standard output of ``program`` in a fresh interpreter, whose environment differs as given (None removes)."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
