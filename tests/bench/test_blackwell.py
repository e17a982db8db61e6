"""`bench blackwell` on a stand-in for the engine: its checks pass, and fail for an engine that rounds otherwise."""

import pytest
import torch

from benchmarks import blackwell
from megaqad.commands.bench import bench_blackwell
from megaqad.errors import UserError
from megaqad.runtime.ranks import ParallelSizes, join_ranks, parallel
from tests.quantization import stand_in_engine


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(blackwell.transformer_engine, "transformer_engine_layers", stand_in_engine.layers)
    monkeypatch.setattr(blackwell, "SHAPES", ((64, 128, 64),))

    def measure():
        join_ranks()
        with parallel(ParallelSizes()) as ranks:
            return list(blackwell.measured(ranks))

    return measure


def test_an_engine_that_computes_as_the_emulated_layers(rows):
    found = rows()
    checks = [row for row in found if "layer" in row]
    assert len(checks) == 2 * 5
    assert all(row["passed"] for row in checks)
    assert found[-1]["passed"]
    assert {row["speed"] for row in found if "speed" in row} == {"bf16", "transformer_engine", "emulated"}
    assert all(row["tflops"] > 0 for row in found if "speed" in row)


def test_an_engine_that_rounds_otherwise(rows, monkeypatch):
    monkeypatch.setattr(stand_in_engine, "fake_quantize", lambda x: x.to(torch.float8_e4m3fn).to(x.dtype))
    found = rows()
    failed = {row["check"] for row in found if "layer" in row and not row["passed"]}
    assert failed == {"output", "gradient of inputs", "gradient of the weight"}
    assert found[-1]["failed"] == 2 * len(failed)
    assert not found[-1]["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="concerns machines without a GPU")
def test_other_machines_are_refused():
    with pytest.raises(UserError, match="needs a GPU with NVFP4, and this machine has no CUDA device"):
        bench_blackwell()
