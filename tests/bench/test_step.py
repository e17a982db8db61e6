"""`bench step` on a small model: every part of both steps, their floors and their memory."""

import json
import math
import sys

import pytest

from benchmarks.step import PARTS
from megaqad.commands import bench as command
from megaqad.errors import UserError
from tests.models.checkpoints import make_checkpoint

SMALL = [
    "data=random",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "quantization=nvfp4",
    "quantization.calibration_samples=4",
    "parallel.data=1",
]


def bench(rank, world_size, arguments):
    """The rows of this rank."""
    from benchmarks.step import rows
    from megaqad.config import check_settings, load_settings
    from megaqad.runtime.ranks import shutdown_parallel

    settings = load_settings(["experiment=demo", *arguments])
    check_settings("bench step", settings)
    try:
        return json.loads(json.dumps(list(rows(settings, repeats=2))))
    finally:
        shutdown_parallel()


def test_rows_add_up(run_ranks, tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    arguments = [f"model={model}", f"output_dir={tmp_path / 'run'}", *SMALL, "parallel.pipeline=2"]
    rows, others = run_ranks(2, bench, arguments)
    assert others == [], "one rank speaks"
    by_part = {row["part"]: row for row in rows}
    assert set(by_part) == {"step", *PARTS}
    step = by_part["step"]
    assert step["ratio"] > 0
    assert math.isclose(step["floor"], 4 / 3)
    assert step["plain_peak_tensor_bytes"] > 0
    assert step["qad_peak_tensor_bytes"] > 0
    assert by_part["teacher forward"]["plain_seconds"] < by_part["teacher forward"]["qad_seconds"]
    assert by_part["weight quantization"]["over_floor"] == by_part["weight quantization"]["over_plain_step"]
    for part in PARTS:
        assert by_part[part]["over_floor"] <= by_part[part]["over_plain_step"]
    assert not (tmp_path / "run").exists(), "a measurement leaves nothing behind"


def test_an_installation_without_the_benchmarks_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.nvfp4", raising=False)
    with pytest.raises(UserError, match="bench nvfp4 needs the directory benchmarks/ of the source tree"):
        command.bench_nvfp4()
