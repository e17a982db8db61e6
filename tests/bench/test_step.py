"""`bench step` on a small model: every part of both steps, their floors and their memory."""

import json
import math

from megaqad.bench.step import PARTS
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
    """The rows that this rank prints."""
    from megaqad.commands import bench as command
    from megaqad.config import check_settings, load_settings
    from megaqad.runtime.ranks import shutdown_parallel

    command.REPEATS = 2
    settings = load_settings(["experiment=demo", *arguments])
    check_settings("bench step", settings)
    rows: list = []
    command.print = lambda line, **_: rows.append(json.loads(line))
    try:
        command.bench_step(settings)
    finally:
        del command.print
        shutdown_parallel()
    return rows


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
