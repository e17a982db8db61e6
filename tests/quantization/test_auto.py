"""``quantization.auto``: the part that suffers most gets more bits, in every layout, and for every later command."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization.choice import read_choice, write_choice
from megaqad.quantization.settings import QuantizationSettings
from tests.distillation.runs import run_command
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


@pytest.fixture
def run(run_ranks, model, tmp_path):
    def on_ranks(name, *overrides, ranks=1, folder="run"):
        settings = [f"model={model}", f"output_dir={tmp_path / folder}", *SETTINGS, *overrides]
        (refusal,) = set(run_ranks(ranks, run_command, name, settings))
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
    assert one.chosen[SENSITIVE] == "bf16"
    assert one.chosen == four.chosen
    assert set(one.chosen.values()) == {"bf16"}, "FP8 rounds inputs, which a weight-only recipe does not"
    assert 5.5 < one.average_bits <= 6.5
    assert max(one.groups, key=lambda group: group.kl_to_teacher).group == SENSITIVE
    for ours, theirs in zip(one.groups, four.groups, strict=True):
        assert ours.group == theirs.group
        assert ours.kl_to_teacher == pytest.approx(theirs.kl_to_teacher, rel=1e-3)
    ptq = json.loads((tmp_path / "one" / "ptq.json").read_text())
    assert ptq["auto"]["chosen"] == one.chosen
    assert [group["group"] for group in ptq["sensitivity"]] == [group.group for group in one.groups]
    assert ptq["auto"]["measured_kl"] == pytest.approx(ptq["kl_to_teacher"], rel=1e-4), "the same held-out tokens"
    assert 0.3 < one.measured_kl / one.predicted_kl < 3, "small KLs add up"


def test_later_commands_follow_the_record_and_measure_nothing(run, tmp_path):
    assert "has chosen nothing" in run("export")
    assert run("quantize") is None
    (tmp_path / "run/ptq/state.json").unlink()  # calibrated again, for another choice than the measurements give
    modules = [f"{ANOTHER}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    changed = replace(read_choice(tmp_path / "run"), chosen={ANOTHER: "bf16"}, formats=dict.fromkeys(modules, "bf16"))
    write_choice(tmp_path / "run", changed, load_settings(SETTINGS).quantization)
    assert run("distill", "resume.allow=[train]", "parallel.tensor=2", ranks=2) is None
    assert run("export") is None
    assert read_choice(tmp_path / "run") == changed
    excluded = json.loads((tmp_path / "run/export/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {name for name in excluded if "layers" in name} == set(modules)


W4A4 = ["quantization=nvfp4", "quantization.auto=bits:6.5", "quantization.exclude=[]"]


def test_fp8_is_chosen_exported_and_used_again(run, tmp_path):
    """Part of a W4A4 model, its head included, becomes FP8; the recipe file gives another run the same bytes."""
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    assert run("quantize", *W4A4, *layout, ranks=2) is None
    choice = read_choice(tmp_path / "run")
    assert 5.5 < choice.average_bits <= 6.5
    assert set(choice.chosen.values()) >= {"fp8"}
    assert all(0 < group.others["fp8"] < group.kl_to_teacher for group in choice.groups)
    assert 0.3 < choice.measured_kl / choice.predicted_kl < 3, "small KLs add up"
    ptq = json.loads((tmp_path / "run/ptq.json").read_text())
    assert ptq["kl_to_teacher"] == pytest.approx(choice.measured_kl, rel=1e-3), "formats switched and built are one"
    bits = {module: layer["bits"] for layer in ptq["layers"] for module in layer["module"].split(", ")}
    assert {module for module, size in bits.items() if size == 8} == {
        module for module, name in choice.formats.items() if name == "fp8"
    }
    assert run("export", *W4A4) is None
    assert run("verify", *W4A4) is None
    quantized = json.loads((tmp_path / "run/export/hf_quant_config.json").read_text())["quantization"]
    algorithms = {module: layer["quant_algo"] for module, layer in quantized["quantized_layers"].items()}
    assert {module for module, name in algorithms.items() if name == "FP8"} == {
        module for module, name in choice.formats.items() if name == "fp8"
    }

    again = [f"quantization={tmp_path / 'run/auto.yaml'}", "quantization.auto=null"]
    for name in ("quantize", "export"):
        assert run(name, *again, folder="again") is None
    assert not (tmp_path / "again/auto.json").exists()
    first, second = (load_file(tmp_path / name / "export/model.safetensors") for name in ("run", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8)), name


def test_a_damaged_record_is_refused(run, tmp_path):
    assert run("quantize") is None
    (tmp_path / "run/auto.json").write_text('{"target_bits": 6.5}')
    refusal = run("quantize")
    assert "auto.json is damaged" in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("weights: nvfp4\nexlude: [lm_head]", "has exlude, which is no setting of a recipe: did you mean exclude?"),
        ("", "holds no settings"),
        ("nvfp4", "has nvfp4, which is no setting"),
        ("weights: nvfp4\nexclude: []\nweights: fp8", "found duplicate key weights"),
        ("weights: [nvfp4", "cannot be read"),
        ("weights: nvfp5", "weights=nvfp5 is unknown"),
    ],
)
def test_a_recipe_file_with_mistakes_is_refused(content, said, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        load_settings([f"quantization={path}"])
    assert "\n" not in str(refused.value)


def test_settings_beside_a_recipe_file_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("weights: fp8\nactivations: fp8\nformats: {'*.mlp.*': nvfp4}\nkv_cache: fp8\n")
    found = load_settings([f"quantization={path}", "quantization.kv_cache=none"]).quantization
    assert found == QuantizationSettings(weights="fp8", activations="fp8", formats={"*.mlp.*": "nvfp4"})


@pytest.mark.parametrize(
    ("settings", "formats"),
    [({}, ("fp8",)), ({"activations": "none"}, ()), ({"backend": "transformer_engine"}, ())],
)
def test_fp8_is_a_candidate_where_it_can_be_computed(settings, formats):
    assert QuantizationSettings(auto="bits:6", **settings).auto_formats == formats
