"""Going on: the numbers of an uninterrupted run, on the same layout bit for bit, and only for the same run."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.cli import main
from megaqad.training.logs import read_metrics
from megaqad.training.optimizer import build_optimizer, update_by_one_kernel
from tests.faults.runs import SMALL, outcome
from tests.models.checkpoints import make_checkpoint
from tests.overrides import merged
from tests.training.runs import copy_through_layout, differences, distill, losses, whole_tensors

STEPS = 4
BASE = [*SMALL, f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


def settings_of(model, run_dir, *overrides):
    return [f"model={model}", f"output_dir={run_dir}", *BASE, *overrides]


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of four steps on two tensor-parallel ranks, with checkpoints of steps 2 and 4."""
    from tests.ranks import run_ranks

    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_ranks(2, distill, settings_of(model, run_dir, "parallel.tensor=2")) == [None, None]
    return run_dir


@pytest.fixture
def half(finished, tmp_path):
    """The same run, interrupted after its second step."""
    run_dir = shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    return run_dir


def test_bit_for_bit_on_the_same_layout(finished, half, model, run_ranks):
    assert run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2")) == [None, None]
    assert outcome(half, STEPS) == outcome(finished, STEPS)


def distill_by_one_kernel(rank, world_size, overrides):
    """As on CUDA; PyTorch has the kernel for the CPU too."""

    def build(*arguments, **options):
        optimizer, scheduler = build_optimizer(*arguments, **options)
        update_by_one_kernel(optimizer)
        return optimizer, scheduler

    with patch("megaqad.recovery.stages.build_optimizer", build):
        return distill(rank, world_size, overrides)


def test_with_adam_as_one_kernel(finished, model, tmp_path, run_ranks):
    """Near the plain one, and resumed bit for bit: its count of steps lies on the device."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ["parallel.tensor=2"]
    assert run_ranks(2, distill_by_one_kernel, settings_of(model, whole, *options)) == [None, None]
    plain, fused = (losses(read_metrics(run / "metrics.jsonl")) for run in (finished, whole))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert run_ranks(2, distill_by_one_kernel, settings_of(model, resumed, *options)) == [None, None]
    assert outcome(resumed, STEPS) == outcome(whole, STEPS)


def test_bfloat16_too(model, tmp_path, run_ranks):
    """Weights in BF16, FP32 main parameters and moments divided over two data-parallel ranks."""
    overrides = ["parallel.data=2", "runtime.dtype=bfloat16"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_ranks(2, distill, settings_of(model, whole, *overrides)) == [None, None]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert run_ranks(2, distill, settings_of(model, resumed, *overrides)) == [None, None]
    assert outcome(resumed, STEPS) == outcome(whole, STEPS)
    names = whole_tensors(whole / "checkpoints" / "step_00000004").keys()
    assert any(name.startswith("optimizer.main.") for name in names)


OTHER_LAYOUTS = [
    ["parallel.tensor=1"],
    ["parallel.data=2"],
    ["parallel.pipeline=2"],
    ["parallel.tensor=2", "parallel.data=2"],
    ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
]


def ranks_of(layout):
    size = 1
    for override in layout:
        name, value = override.split("=")
        size *= int(value) if name in ("parallel.tensor", "parallel.data", "parallel.pipeline") else 1
    return size


@pytest.mark.parametrize("layout", OTHER_LAYOUTS, ids=" ".join)
def test_every_layout_reads_every_bit(layout, finished, model, run_ranks, tmp_path):
    """Loaded into another layout and written again: the same weights, moments and main parameters."""
    target = tmp_path / "checkpoints" / "step_00000004"
    target.parent.mkdir()
    run_ranks(ranks_of(layout), copy_through_layout, settings_of(model, finished, *layout), target)
    original = whole_tensors(finished / "checkpoints" / "step_00000004")
    assert differences(original, whole_tensors(target)) == []


@pytest.mark.parametrize("layout", OTHER_LAYOUTS[:3], ids=" ".join)
def test_close_on_another_layout(layout, finished, half, model, run_ranks):
    """Sums are taken in another order and a last bit can flip a code: within 2e-2 of the loss."""
    ranks = ranks_of(layout)
    assert run_ranks(ranks, distill, settings_of(model, half, *layout)) == [None] * ranks
    rows, expected = outcome(half, STEPS).metrics, outcome(finished, STEPS).metrics
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    torch.testing.assert_close(losses(rows), losses(expected), rtol=2e-2, atol=0)
    assert [row["lr"] for row in rows] == [row["lr"] for row in expected]


def refusal(capsys, arguments):
    code = main(["distill", *merged(arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=7", "seed=1234, this one has 7"),
        ("train.lr=2e-3", "train.lr=0.001, this one has 0.002"),
        ("train.steps=6", "train.steps=4, this one has 6"),
        ("quantization=nvfp4_weight_only", "quantization.activations="),
        ("data.max_train_tokens=10000", "data.max_train_tokens=20000, this one has 10000"),
        ("runtime.dtype=bfloat16", "runtime.dtype=float32, this one has bfloat16"),
        ("distill.objective=qat", "distill.objective=qad, this one has qat"),
    ],
)
def test_another_setting_is_refused_by_name(override, named, half, model, capsys):
    line = refusal(capsys, settings_of(model, half, "parallel.tensor=2", override))
    assert named in line
    key = named.split("=")[0]
    assert f"resume.allow=[{key}]" in line


def test_another_model_of_the_same_shape(half, model, capsys, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = refusal(capsys, settings_of(other, half, "parallel.tensor=2"))
    assert "belongs to a run with another model (its content differs)" in line


def test_another_tokenizer(half, model, capsys, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    line = refusal(capsys, settings_of(other, half, "parallel.tensor=2"))
    assert "belongs to a run with another tokenizer" in line


def test_a_permission_that_permits_nothing(half, model, capsys):
    line = refusal(capsys, settings_of(model, half, "parallel.tensor=2", "resume.allow=[weather]"))
    assert "resume.allow names weather" in line


@pytest.mark.parametrize("allow", ["train"])
def test_what_is_listed_may_differ(allow, half, model, run_ranks):
    """Trained for longer than was planned: the schedule is the new one, from where the run stands."""
    overrides = ["parallel.tensor=2", "train.steps=6", f"resume.allow=[{allow}]"]
    assert run_ranks(2, distill, settings_of(model, half, *overrides)) == [None, None]
    rows = outcome(half, 6).metrics
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((half / "run.json").read_text())["train.steps"] == 6


def test_a_checkpoint_of_another_run_in_the_directory(finished, half, model, run_ranks, tmp_path):
    """run.json agrees, the checkpoint does not: someone has copied it here."""
    other = tmp_path / "other"
    overrides = ["parallel.tensor=2", "seed=99", "train.steps=2", "train.warmup_steps=0"]
    assert run_ranks(2, distill, settings_of(model, other, *overrides)) == [None, None]
    shutil.copytree(other / "checkpoints" / "step_00000002", half / "checkpoints" / "step_00000003")
    messages = run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2"))
    assert messages[0] == messages[1]
    assert "step_00000003 belongs to a run with" in messages[0]


def test_changed_training_text_is_noticed(run_ranks, tmp_path, monkeypatch):
    """The file has the same name and other words."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    overrides = ["model=bundled", f"output_dir={tmp_path / 'run'}", *BASE, "train.steps=1", "train.warmup_steps=0"]
    overrides[overrides.index("data=random")] = f"data={text}"
    assert run_ranks(1, distill, overrides) == [None]
    text.write_text("the quick brown fox jumps over the lazy cat\n" * 200)
    [message] = run_ranks(1, distill, overrides)
    assert "belongs to a run with another set of training tokens" in message
    assert run_ranks(1, distill, [*overrides, "resume.allow=[data]"]) == [None]


def test_a_damaged_checkpoint_is_passed_over(finished, half, model, run_ranks, capfd):
    shutil.copytree(finished / "checkpoints" / "step_00000004", half / "checkpoints" / "step_00000004")
    path = half / "checkpoints" / "step_00000004" / "training" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(bytes(content))
    assert run_ranks(2, distill, settings_of(model, half, "parallel.tensor=2")) == [None, None]
    assert outcome(half, STEPS) == outcome(finished, STEPS)
