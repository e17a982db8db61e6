"""Learned scales in training: they move, they are the same whatever the layout, and they survive a checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megaqad.training.pieces import Box
from megaqad.training.store import HostPiece, PieceReader, write_pieces
from tests.faults.runs import SMALL, outcome
from tests.models.checkpoints import make_checkpoint
from tests.ranks import run_ranks
from tests.training.runs import copy_through_layout, differences, distill, losses, whole_tensors

STEPS = 4
LEARNED = ["quantization.weight_scales=learned", "quantization.calibration=mse", "quantization.scale_lr=1e-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


def settings_of(model, run_dir, *overrides):
    return [f"model={model}", f"output_dir={run_dir}", *SMALL, f"train.steps={STEPS}", *LEARNED, *overrides]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """Four steps on two tensor-parallel ranks, checkpoints of steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_ranks(2, distill, settings_of(model, run_dir, "parallel.tensor=2")) == [None, None]
    return run_dir


def checkpoint(run_dir, step=STEPS):
    return run_dir / "checkpoints" / f"step_{step:08d}"


def scales_of(tensors):
    return {name: value for name, value in tensors.items() if name.endswith(("weight_amax", "weight_block_amax"))}


def test_they_learn_at_their_own_rate(finished):
    """Every block scale moves, by about the sum of the learning rates: Adam's steps are as large as those."""
    after = scales_of(whole_tensors(checkpoint(finished)))
    before = scales_of(whole_tensors(finished / "ptq"))
    weights = [name for name in after if not name.startswith("optimizer.")]
    assert len(weights) == 4 * (7 + 4)  # in each layer block scales of seven tensors, one scale of each of four GEMMs
    for name in weights:
        moved = (after[name] - before[name]).abs()
        assert moved.max() < 1.1 * STEPS * 1e-3
        if name.endswith("block_amax"):
            assert (moved > 1e-4).float().mean() > 0.9, name
    assert any((after[name] != before[name]).all() for name in weights if name.endswith(".weight_amax"))


def test_bit_for_bit_after_a_resume(finished, model, tmp_path):
    half = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(checkpoint(half))
    assert run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2")) == [None, None]
    assert outcome(half, STEPS) == outcome(finished, STEPS)


LAYOUTS = [
    ["parallel.tensor=1"],
    ["parallel.pipeline=2", "parallel.data=2"],
    ["parallel.tensor=2", "parallel.pipeline=2"],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_every_layout_reads_every_bit(layout, finished, model, tmp_path):
    target = checkpoint(tmp_path)
    target.parent.mkdir()
    ranks = 1
    for override in layout:
        ranks *= int(override[-1])
    run_ranks(ranks, copy_through_layout, settings_of(model, finished, *layout), target)
    original = whole_tensors(checkpoint(finished))
    assert any(name.startswith("optimizer.exp_avg.") and name.endswith("weight_block_amax") for name in original)
    assert differences(original, whole_tensors(target)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sharded_model_learns_the_dense_ones_scales(dtype, model, tmp_path):
    """One step of a rate that shows every gradient's sign, and the norm that all of them are clipped by."""
    one_step = ["train.steps=1", "train.warmup_steps=0", f"runtime.dtype={dtype}"]
    rows, scales = [], []
    for layout in ([], ["parallel.tensor=2"], ["parallel.tensor=2", "parallel.sequence=true"]):
        run_dir = tmp_path / "-".join(["run", *layout])
        ranks = 2 if layout else 1
        assert run_ranks(ranks, distill, settings_of(model, run_dir, *one_step, *layout)) == [None] * ranks
        rows.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0]))
        scales.append(scales_of(whole_tensors(checkpoint(run_dir, 1))))
    for row, found in zip(rows[1:], scales[1:], strict=True):
        if dtype == "bfloat16":  # rounding differs between layouts: the scales are there and finite
            assert all(value.isfinite().all() for value in found.values())
            continue
        torch.testing.assert_close(losses([row]), losses(rows[:1]), rtol=1e-3, atol=0)
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=2e-2)
        for name, value in scales[0].items():
            if name.startswith("optimizer.exp_avg.") and name.endswith(".weight_amax"):
                torch.testing.assert_close(found[name], value, rtol=0.2, atol=2e-4 * row["grad_norm"])


def rewrite(path, change):
    """Write a checkpoint file again with its pieces changed; its new entry for the manifest."""
    reader = PieceReader([path])
    stored = [one for pieces in reader._stored.values() for one in pieces]
    pieces = [HostPiece(one.piece, reader._run_of_box([one], one.piece.start, one.piece.stop)) for one in stored]
    reader.close()
    path.unlink()
    digest = write_pieces(path, change(pieces))
    return {"size": digest.size, "sha256": digest.sha256}


def is_scale(held):
    return held.piece.key.endswith("layers.1.mlp.down_proj.weight_block_amax")


def without(pieces):
    return [held for held in pieces if not is_scale(held)]


def with_another(pieces):
    more = [replace(held, piece=replace(held.piece, key=f"{held.piece.key}_too")) for held in pieces if is_scale(held)]
    return [*pieces, *more]


def flattened(pieces):
    """As if the scales were one row."""
    found = []
    for held in pieces:
        piece = held.piece
        if is_scale(held):
            width = piece.box.numel
            box = Box((0, piece.box.offset[1] * piece.box.shape[0]), (1, width))
            piece = replace(piece, global_shape=(1, 2 * width), box=box)
        found.append(replace(held, piece=piece))
    return found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without, "the checkpoint has no tensor {}: it belongs to another model or recipe"),
        (with_another, "holds {}_too, which this model and recipe do not have"),
        (flattened, "{} has shape "),
    ],
)
def test_a_wrong_scale_is_refused_by_name(change, named, finished, model, tmp_path):
    """Missing, extra or of another shape, with checksums that agree."""
    half = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(checkpoint(half))
    directory = checkpoint(half, 2)
    manifest = json.loads((directory / "manifest.json").read_text())
    for path in sorted((directory / "weights").glob("*.safetensors")):
        manifest["files"][f"weights/{path.name}"] = rewrite(path, change)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    messages = run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2"))
    assert messages[0] == messages[1]
    assert named.format("model.layers.1.mlp.down_proj.weight_block_amax") in messages[0]
    assert len(messages[0].splitlines()) == 1


@pytest.mark.parametrize("kind", ["refreshed", "frozen"])
def test_another_kind_of_scales(kind, finished, model, tmp_path):
    """Allowed to differ, the recipe still has to have the checkpoint's tensors."""
    half = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(checkpoint(half))
    other = [f"quantization.weight_scales={kind}", "quantization.scale_lr=null", "resume.allow=[quantization]"]
    messages = run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2", *other))
    assert "which this model and recipe do not have" in messages[0]
