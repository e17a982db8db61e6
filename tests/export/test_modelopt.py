"""Exported bytes are ModelOpt's, and the same from every layout."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megaqad.export.manifest import MANIFEST_FILE, tensor_digest
from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes
from tests.export.export_runs import export_weights, refused_export
from tests.export.modelopt_fixture import max_settings, modelopt_export
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens
from tests.ranks import run_ranks

LAYOUTS = [
    ParallelSizes(tensor=2),
    ParallelSizes(pipeline=2),
    ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


RECIPES: dict[str, tuple[str, dict[str, str], str]] = {
    # case, format by pattern (the last that matches), KV cache
    "nvfp4": ("llama", {"*": "nvfp4"}, "none"),
    "weight only": ("qwen2", {"*": "nvfp4_weight_only"}, "none"),
    "nvfp4 with norms": ("qwen3", {"*": "nvfp4"}, "none"),
    "fp8, kv fp8": ("qwen3", {"*": "fp8"}, "fp8"),
    "nvfp4, kv nvfp4": ("mistral", {"*": "nvfp4"}, "nvfp4"),
    "mixed, kv fp8": ("llama", {"*": "nvfp4", "*.self_attn.*": "fp8"}, "fp8"),
    "mixed of four": (
        "mxfp_llama",
        {"*": "nvfp4", "*.self_attn.*": "mxfp8", "*.1.*": "nvfp4_weight_only", "*.2.mlp*": "bf16", "*.3.mlp*": "mxfp8"},
        "none",
    ),
    "mxfp8": ("mxfp_llama", {"*": "mxfp8"}, "none"),
    "mxfp4": ("mxfp_llama", {"*": "mxfp4"}, "none"),
    "with a head": ("llama", {"*": "nvfp4", "lm_head": "fp8"}, "none"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_equal_modelopt_from_every_layout(recipe: str, tmp_path: Path) -> None:
    case, patterns, kv_cache = RECIPES[recipe]
    folder = make_checkpoint(case, tmp_path / "in", dtype=torch.bfloat16)
    tokens = torch.from_numpy(random_tokens(CASES[case]["vocab_size"]))
    theirs = modelopt_export(folder, tmp_path / "theirs", tokens, max_settings(patterns, kv_cache))
    modules = describe_model(folder).linear_modules + (["lm_head"] if "lm_head" in patterns else [])
    formats = {name: [choice for pattern, choice in patterns.items() if fnmatch(name, pattern)][-1] for name in modules}
    formats = {name: choice for name, choice in formats.items() if choice != "bf16"}

    def export(sizes: ParallelSizes, name: str) -> Path:
        options = {"output_dir": tmp_path / name, "formats": formats, "kv_cache": kv_cache, **vars(theirs)}
        run_ranks(sizes.model_ranks, export_weights, folder, sizes, options)
        return tmp_path / name

    ours = export(ParallelSizes(), "ours")
    expected = load_file(tmp_path / "theirs/model.safetensors")
    written = load_file(ours / "model.safetensors")
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert written[name].dtype is tensor.dtype, name
        assert written[name].shape == tensor.shape, name
        assert tensor_digest(written[name]) == tensor_digest(tensor), name
    for file in ("hf_quant_config.json", "config.json"):
        expected_json = json.loads((tmp_path / "theirs" / file).read_text())
        assert json.loads((ours / file).read_text()) == expected_json, file
    for index, sizes in enumerate(LAYOUTS):
        assert contents(export(sizes, f"layout{index}")) == contents(ours), sizes


def test_a_recipe_that_keeps_attention_lists_full_names(tmp_path: Path) -> None:
    folder = make_checkpoint("mistral", tmp_path / "in", dtype=torch.bfloat16)
    modules = [name for name in describe_model(folder).linear_modules if "mlp" in name]
    options = {
        "output_dir": tmp_path / "out",
        "formats": dict.fromkeys(modules, "nvfp4"),
        "input_amax": dict.fromkeys(modules, 2.0),
    }
    run_ranks(1, export_weights, folder, ParallelSizes(), options)
    written = load_file(tmp_path / "out/model.safetensors")
    original = load_file(folder / "model.safetensors")
    excluded = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    attention = [name for name in describe_model(folder).linear_modules if "self_attn" in name]
    assert excluded == [*attention, "lm_head", "model.embed_tokens"]
    for name in attention:
        assert torch.equal(written[f"{name}.weight"], original[f"{name}.weight"])
    assert written[f"{modules[0]}.weight"].dtype is torch.uint8


def test_fp32_weights_are_cast_first(tmp_path: Path) -> None:
    """Scales and codes come from the BF16 tensor: an FP32 run exports what its BF16 cast would."""
    wide = make_checkpoint("llama", tmp_path / "wide", dtype=torch.float32)
    narrow = make_checkpoint("llama", tmp_path / "narrow", dtype=torch.bfloat16)
    modules = describe_model(wide).linear_modules
    for folder, dtype, name in ((wide, torch.float32, "a"), (narrow, torch.bfloat16, "b")):
        options = {
            "output_dir": tmp_path / name,
            "formats": dict.fromkeys(modules, "nvfp4_weight_only"),
            "dtype": dtype,
        }
        run_ranks(1, export_weights, folder, ParallelSizes(), options)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_several_files_hold_the_same_tensors(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=torch.bfloat16)
    modules = describe_model(folder).linear_modules
    options: dict[str, Any] = {"formats": dict.fromkeys(modules, "nvfp4"), "input_amax": dict.fromkeys(modules, 1.0)}
    run_ranks(1, export_weights, folder, ParallelSizes(), {**options, "output_dir": tmp_path / "one"})
    split = {**options, "output_dir": tmp_path / "many", "max_file_bytes": 40_000}
    run_ranks(2, export_weights, folder, ParallelSizes(tensor=2), split)
    weight_map = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3
    one, many = (json.loads((tmp_path / name / MANIFEST_FILE).read_text()) for name in ("one", "many"))
    assert one["tensors"] == many["tensors"]
    assert set(weight_map) == set(one["tensors"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_on_one_rank_stops_all_of_them(value: float, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=torch.bfloat16)
    modules = describe_model(folder).linear_modules
    options = {"output_dir": tmp_path / "out", "formats": dict.fromkeys(modules, "nvfp4_weight_only"), "spoil": value}
    messages = run_ranks(4, refused_export, folder, ParallelSizes(tensor=2, pipeline=2), options)
    assert len(set(messages)) == 1
    assert messages[0].startswith("export refused: model.layers.3.mlp.down_proj.weight holds")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("value", [None, 0.0, float("inf")])
def test_an_input_that_was_not_calibrated_is_refused(value: float | None, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=torch.bfloat16)
    modules = describe_model(folder).linear_modules
    amax = {**dict.fromkeys(modules, 1.0), "model.layers.1.mlp.down_proj": value}
    if value is None:
        del amax["model.layers.1.mlp.down_proj"]
    options = {"output_dir": tmp_path / "out", "formats": dict.fromkeys(modules, "nvfp4"), "input_amax": amax}
    message = run_ranks(1, refused_export, folder, ParallelSizes(), options)[0]
    assert "model.layers.1.mlp.down_proj has a largest calibrated input of" in message
    assert not (tmp_path / "out").exists()
