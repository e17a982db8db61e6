"""Which implementation runs: the one that is named, or the fastest that can."""

import pytest
import torch

from megaqad.losses import kernels
from tests.losses.implementations import WITHOUT_COMPILER, WITHOUT_TRITON

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NARROW, HALF = {torch.float32, torch.bfloat16}, {torch.float16}


def test_auto_takes_the_fastest_that_can_run() -> None:
    assert kernels.choose("auto", CPU, NARROW).name == ("torch" if WITHOUT_COMPILER else "native")
    assert kernels.choose("auto", CPU, HALF).name == "torch"
    assert kernels.choose("auto", CUDA, NARROW).name == ("torch" if WITHOUT_TRITON else "triton")


@pytest.mark.parametrize("name", ["torch", "native", "triton"])
def test_a_name_takes_that_one_or_refuses(name: str) -> None:
    missing = {"torch": None, "native": WITHOUT_COMPILER, "triton": WITHOUT_TRITON}[name]
    if missing is not None:
        pytest.skip(missing)
    assert kernels.choose(name, CPU, NARROW).name == name  # the tests' triton is the interpreter


@pytest.mark.parametrize(("device", "dtypes"), [(CUDA, NARROW), (CPU, HALF)])
def test_native_says_what_it_takes(device: torch.device, dtypes: set[torch.dtype]) -> None:
    with pytest.raises(ValueError, match=r"^impl='native' cannot run: it takes float32 and bfloat16 on the CPU, not "):
        kernels.choose("native", device, dtypes)
