"""``quantization.auto``: the part that suffers most stays BF16, in every layout, and for every later command."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization.choice import read_choice, write_choice
from megaqad.runtime.parallel import shutdown_parallel
from tests.models.checkpoints import make_checkpoint

SENSITIVE, ANOTHER = "model.layers.2.mlp", "model.layers.1.mlp"
SETTINGS = [
    *("data=random", "runtime.dtype=float32", "quantization=nvfp4_weight_only", "quantization.auto=bits:6.5"),
    *("train.sequence_length=32", "train.micro_batch_size=2", "train.global_batch_size=4", "train.steps=1"),
    *("evaluation.max_tokens=256", "evaluation.training_tokens=256", "logging.wandb.mode=disabled"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint in which one layer's MLP says more than all else."""
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and not name.startswith(SENSITIVE):
            tensor.mul_(0.05)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def command(rank, world_size, name, overrides):
    """One command on these ranks; its refusal, None when it ends well."""
    import importlib

    try:
        vars(importlib.import_module(f"megaqad.commands.{name}"))[name](load_settings(overrides))
    except UserError as error:
        return str(error)
    finally:
        shutdown_parallel()
    return None


@pytest.fixture
def run(run_ranks, model, tmp_path):
    def on_ranks(name, *overrides, ranks=1, folder="run"):
        settings = [f"model={model}", f"output_dir={tmp_path / folder}", *SETTINGS, *overrides]
        (refusal,) = set(run_ranks(ranks, command, name, settings))
        return refusal

    return on_ranks


def test_the_sensitive_part_is_kept_in_every_layout(run, tmp_path):
    choices = []
    for folder, ranks, layout in (
        ("one", 1, []),
        ("four", 4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    ):
        assert run("quantize", *layout, ranks=ranks, folder=folder) is None
        choices.append(read_choice(tmp_path / folder))
        assert (tmp_path / folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    one, four = choices
    assert SENSITIVE in one.kept
    assert one.kept == four.kept
    assert 5.5 < one.average_bits <= 6.5
    assert max(one.groups, key=lambda group: group.kl_to_teacher).group == SENSITIVE
    for ours, theirs in zip(one.groups, four.groups, strict=True):
        assert ours.group == theirs.group
        assert ours.kl_to_teacher == pytest.approx(theirs.kl_to_teacher, rel=1e-3)
    ptq = json.loads((tmp_path / "one" / "ptq.json").read_text())
    assert ptq["auto"]["kept"] == list(one.kept)
    assert [group["group"] for group in ptq["sensitivity"]] == [group.group for group in one.groups]
    assert ptq["auto"]["measured_kl"] == pytest.approx(ptq["kl_to_teacher"], rel=1e-4), "the same held-out tokens"
    assert 0.3 < one.measured_kl / one.predicted_kl < 3, "small KLs add up"


def test_later_commands_follow_the_record_and_measure_nothing(run, tmp_path):
    assert "has chosen nothing" in run("export")
    assert run("quantize") is None
    (tmp_path / "run/ptq/state.json").unlink()  # calibrated again, for another choice than the measurements give
    modules = tuple(f"{ANOTHER}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    changed = replace(read_choice(tmp_path / "run"), kept=(ANOTHER,), kept_modules=modules)
    write_choice(tmp_path / "run", changed)
    assert run("distill", "resume.allow=[train]", "parallel.tensor=2", ranks=2) is None
    assert run("export") is None
    assert read_choice(tmp_path / "run") == changed
    excluded = json.loads((tmp_path / "run/export/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {name for name in excluded if "layers" in name} == set(modules)


def test_a_damaged_record_is_refused(run, tmp_path):
    assert run("quantize") is None
    (tmp_path / "run/auto.json").write_text('{"target_bits": 6.5}')
    refusal = run("quantize")
    assert "auto.json is damaged" in refusal
    assert "\n" not in refusal
