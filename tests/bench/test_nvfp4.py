"""``bench_nvfp4``: every measurement is complete, consistent and JSON, and it refuses to time what differs."""

import json

import pytest
import torch

from benchmarks import nvfp4
from benchmarks.nvfp4 import bench_nvfp4
from megaqad.nvfp4 import NVFP4Tensor
from tests.nvfp4.implementations import WITHOUT_COMPILER


def test_measurements_are_consistent():
    rows = list(bench_nvfp4(shapes=((64, 64),), device="cpu", repeats=3))
    by_operation = {(r["operation"], r["amax"]): {} for r in rows}
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        by_operation[row["operation"], row["amax"]][row["impl"]] = row
    assert set(by_operation) == {
        ("fake_quantize", "own"),
        ("fake_quantize", "rows"),
        ("fake_quantize", "given"),
        ("quantize", "own"),
        ("fake_quantize_packed", "given"),
        ("dequantize", "none"),
    }
    for (operation, amax), impls in by_operation.items():
        assert set(impls) - {"modelopt"} == {"reference", "torch"} | ({"native"} if WITHOUT_COMPILER is None else set())
        assert ("modelopt" in impls) == (operation != "fake_quantize_packed" and amax != "rows")
        reference = impls["reference"]
        for row in impls.values():
            assert 0 < row["seconds_min"] <= row["seconds"]
            assert row["speedup_over_reference"] == reference["seconds"] / row["seconds"]
            if "modelopt" in impls:
                assert row["speedup_over_modelopt"] == impls["modelopt"]["seconds"] / row["seconds"]
            else:
                assert row["speedup_over_modelopt"] is None
            moved = row["gigabytes_per_second"] * row["seconds"]
            assert moved == pytest.approx(reference["gigabytes_per_second"] * reference["seconds"])
    own, given = (by_operation["fake_quantize", a]["torch"] for a in ("own", "given"))
    assert own["gigabytes_per_second"] * own["seconds"] * 1e9 == pytest.approx(3 * 64 * 64 * 2)
    assert given["gigabytes_per_second"] * given["seconds"] * 1e9 == pytest.approx(2 * 64 * 64 * 2)


def test_the_fast_paths_are_fast():
    """A third or less of what an idle machine shows, by the fastest of several runs, since a busy one must do."""
    rows = list(bench_nvfp4(shapes=((1024, 1024),), device="cpu", repeats=7))
    best = {r["impl"]: r["seconds_min"] for r in rows if (r["operation"], r["amax"]) == ("fake_quantize", "own")}
    for impl, times in {"torch": 3, "native": 10}.items():
        if impl in best:
            assert min(best["reference"], best["modelopt"]) / best[impl] > times, best


def test_differing_results_are_not_timed(monkeypatch):
    honest = nvfp4._modelopt_quantize

    def swapped_nibbles(x: torch.Tensor, s2: torch.Tensor | None) -> NVFP4Tensor:
        q = honest(x, s2)
        return NVFP4Tensor((q.codes << 4) | (q.codes >> 4), q.block_scales, q.global_scale)

    monkeypatch.setattr(nvfp4, "_modelopt_quantize", swapped_nibbles)
    with pytest.raises(AssertionError, match="fake_quantize: modelopt and reference differ"):
        list(bench_nvfp4(shapes=((64, 64),), device="cpu", repeats=1))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        next(bench_nvfp4(shapes=((4, 32),), device="cpu", repeats=0))
    with pytest.raises(ValueError, match="divisible by 16"):
        next(bench_nvfp4(shapes=((4, 24),), device="cpu", repeats=1))
