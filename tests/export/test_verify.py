"""verify passes on what was exported and fails, naming the culprit, on anything else."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.export.dequantizer import read_nvfp4, round_e2m1, round_nvfp4
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest
from megaqad.export.reference import StudentReference
from megaqad.export.verify import Verification, VerificationError, verify
from megaqad.nvfp4 import fake_quantize, quantize
from megaqad.runtime.ranks import ParallelSizes
from tests.export.export_runs import calibrate_and_export
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens
from tests.ranks import run_ranks

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Export:
    """An export and the student it came from."""

    folder: Path
    tokens: np.ndarray
    reference: StudentReference


def exported(
    case: str, folder: Path, sizes: ParallelSizes, dtype: torch.dtype = torch.float32, **settings: Any
) -> Export:
    make_checkpoint(case, folder / "in", dtype=torch.bfloat16)
    tokens = random_tokens(CASES[case]["vocab_size"], batch=2, length=32)
    options = {"output_dir": folder / "out", "settings": settings, "dtype": dtype, "tokens": tokens}
    results = run_ranks(sizes.model_ranks, calibrate_and_export, folder / "in", sizes, options)
    return Export(folder / "out", tokens, results[0])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Export:
    sizes = ParallelSizes(tensor=2, pipeline=2, sequence=True)
    return exported("llama", tmp_path_factory.mktemp("llama"), sizes)


@pytest.fixture
def export(original: Export, tmp_path: Path) -> Export:
    shutil.copytree(original.folder, tmp_path / "export")
    return replace(original, folder=tmp_path / "export")


def check(export: Export, **changes: Any) -> Verification:
    return verify(export.folder, tokens=export.tokens, **{**vars(export.reference), **changes})


def refused(export: Export, *words: str, **changes: Any) -> None:
    with pytest.raises(VerificationError) as caught:
        check(export, **changes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_good_export_passes(export: Export, tmp_path: Path) -> None:
    result = check(export, report=tmp_path / "verify.json")
    assert result.relative_error < 1e-4
    assert result.weights_relative_error is not None
    assert result.weights_relative_error < 1e-5
    assert result.activation_effect is not None
    assert result.activation_effect > 0.05
    assert result.kl_to_student < 1e-8
    assert result.top1_agreement == 1.0
    assert result.quantized_modules == 4 * 7
    assert result.tensors == 3 + 4 * (2 + 7 * 4)
    assert result.readers == {
        "safetensors": "passed",
        "engine_rules": "passed",
        "scales": "passed",
        "compressed_tensors": "skipped: it reads exports with quant_method=compressed-tensors, this one has modelopt",
        "compressed_tensors_converter": "passed",
        "transformers": "passed",
        "llama_cpp": "skipped: llama_cpp is not installed",
    }
    assert json.loads((tmp_path / "verify.json").read_text()) == asdict(result)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("qwen2", {"activations": "none"}),
        ("qwen3", {"exclude": ["lm_head", "*self_attn*"]}),
        ("llama_tied_scaled", {}),
        ("mistral", {"weights": "none", "activations": "none"}),
        ("qwen3", {"weights": "fp8", "activations": "fp8", "kv_cache": "fp8"}),
        ("llama", {"exclude": [], "formats": {"*.self_attn.*": "fp8", "lm_head": "fp8"}}),
        ("llama", {"exclude": [], "kv_cache": "fp8"}),
        ("mistral", {"kv_cache": "nvfp4", "activations": "none"}),
        ("qwen3", {"kv_cache": "fp8_cast"}),
        ("mistral", {"kv_cache": "nvfp4_cast", "activation_scales": "dynamic"}),
        ("qwen3", {"activation_scales": "dynamic"}),
        ("llama", {"activation_scales": "dynamic", "exclude": [], "formats": {"*_proj": "fp8"}, "kv_cache": "fp8"}),
        (
            "mxfp_llama",
            {"activation_scales": "dynamic", "formats": {"*.1.mlp.*": "mxfp8", "*.2.mlp.*": "nvfp4_weight_only"}},
        ),
        ("mxfp_llama", {"weights": "mxfp8", "activations": "mxfp8"}),
        ("mxfp_llama", {"weights": "mxfp4", "activations": "mxfp4", "formats": {"*.mlp.*": "nvfp4_weight_only"}}),
    ],
    ids=str,
)
def test_other_recipes_and_families_pass(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    export = exported(case, tmp_path, ParallelSizes(tensor=2), **settings)
    result, streamed = check(export, model="full"), check(export, model="streamed")
    for found in (result, streamed):
        assert found.weights_relative_error is not None
        assert found.weights_relative_error < 1e-5
    assert result.weight_only == (settings.get("activations") == "none" and "weights" not in settings)


def test_a_bf16_student_is_compared_without_its_rounding(tmp_path: Path) -> None:
    """On two tensor-parallel ranks, where another order of additions may flip a code."""
    result = check(exported("qwen3", tmp_path, ParallelSizes(tensor=2, pipeline=2), torch.bfloat16))
    assert result.weights_relative_error is not None
    assert result.weights_relative_error < 1e-5


def test_without_the_weight_only_logits_agreement_must_be_exact(export: Export) -> None:
    assert check(export, weight_only_logits=None).weights_relative_error is None
    noisy = export.reference.reference_logits + 0.01
    noisy[..., 3] -= 0.05
    refused(export, "does not compute", "unknown with unquantized", weight_only_logits=None, reference_logits=noisy)


def tensor_span(folder: Path, name: str) -> tuple[int, int]:
    """First and one-past-last byte of a tensor in the file."""
    data = (folder / WEIGHTS).read_bytes()
    header = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    return 8 + header + begin, 8 + header + end


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "model.layers.3.mlp.down_proj.weight_scale_2",
        "model.layers.1.self_attn.o_proj.input_scale",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_one_changed_byte_is_named(export: Export, name: str) -> None:
    path = export.folder / WEIGHTS
    data = path.read_bytes()
    begin, end = tensor_span(export.folder, name)
    for place in (begin, end - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :])
        refused(export, f"tensor {name} changed")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors and make the manifest agree: what an exporter with a defect would leave behind."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["tensors"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


Q = "model.layers.1.self_attn.q_proj"


def swap_nibbles(tensors: dict[str, torch.Tensor]) -> None:
    codes = tensors[f"{Q}.weight"]
    tensors[f"{Q}.weight"] = (codes << 4) | (codes >> 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.input_scale"), [f"{Q}.input_scale is missing"]),
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight is missing"]),
        (lambda t: t.update(extra=torch.ones(1)), ["extra is not part of this model"]),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1].clone()}), [f"{Q}.weight is", "[95, 32]"]),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
            ["model.norm.weight is torch.float32"],
        ),
        (lambda t: t[f"{Q}.weight_scale"].view(torch.uint8)[3, 1].fill_(0x7F), [f"{Q}.weight_scale holds NaN"]),
        (lambda t: t[f"{Q}.weight_scale"].view(torch.uint8)[3, 1].fill_(0), [f"{Q}.weight_scale", "not positive"]),
        (lambda t: t[f"{Q}.input_scale"].zero_(), [f"{Q}.input_scale", "not positive"]),
        (lambda t: t[f"{Q}.weight_scale_2"].mul_(1.0000002), ["weight_scale_2 differs among fused", "k_proj"]),
        (lambda t: t[f"{Q}.input_scale"].mul_(2), ["input_scale differs among fused modules"]),
        (lambda t: t["lm_head.weight"][7].fill_(float("inf")), ["lm_head.weight holds NaN or Inf"]),
        (swap_nibbles, ["does not compute the student's logits"]),
        (
            lambda t: t["model.layers.3.mlp.down_proj.input_scale"].mul_(1.000001),
            ["down_proj.input_scale is", "stands for"],
        ),
        (lambda t: t["model.layers.0.mlp.down_proj.weight_scale_2"].mul_(1.01), ["does not compute the student's"]),
    ],
)
def test_defects_of_an_exporter_are_found(export: Export, change: Callable[[dict], Any], words: list[str]) -> None:
    rewrite(export.folder, change)
    refused(export, *words)


def rewrite_json(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][name] = file_digest(folder / name)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "config.json",
            lambda c: c["quantization_config"]["ignore"].append(Q),
            ["config.json says excluded modules="],
        ),
        ("hf_quant_config.json", lambda c: c["quantization"].update(group_size=32), ["no layout that can be verified"]),
        (
            "config.json",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=32),
            ["config_groups of config.json say"],
        ),
        ("hf_quant_config.json", lambda c: c["quantization"].pop("kv_cache_quant_algo"), ["kv_cache_quant_algo"]),
        ("config.json", lambda c: c["quantization_config"].pop("config_groups"), ["lack 'config_groups'"]),
        ("config.json", lambda c: c.pop("quantization_config"), ["input_scale is not part of this model"]),
        (
            "config.json",
            lambda c: c["quantization_config"].update(activation_scheme="dynamic"),
            ["config.json says activation_scheme=dynamic, hf_quant_config.json None"],
        ),
    ],
)
def test_contradicting_settings_are_found(export: Export, name: str, change: Callable, words: list[str]) -> None:
    rewrite_json(export.folder, name, change)
    refused(export, *words)


@pytest.mark.parametrize(
    ("excluded", "quantized"),
    [
        ("model.layers.3.mlp", "model.layers.3.mlp.gate_up_proj"),  # inside the name
        ("model.layers.2.self_attn.q", "model.layers.2.self_attn.qkv_proj"),  # inside the engine's own name
        ("model.layers.*.self_attn.o_proj", "model.layers."),  # a pattern
    ],
)
def test_exclusions_that_engines_take_for_more_are_found(export: Export, excluded: str, quantized: str) -> None:
    rewrite_json(export.folder, "config.json", lambda c: c["quantization_config"]["ignore"].append(excluded))
    rewrite_json(export.folder, "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].append(excluded))
    refused(export, quantized, f"engines also take the excluded {excluded} for it")


def test_fused_modules_in_two_formats_are_found(tmp_path: Path) -> None:
    """k_proj in BF16 beside q_proj and v_proj in NVFP4: engines multiply the three as one."""
    export = exported("llama", tmp_path, ParallelSizes(), activations="none")
    module = "model.layers.1.self_attn.k_proj"

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for ending in ("weight_scale", "weight_scale_2"):
            del tensors[f"{module}.{ending}"]
        tensors[f"{module}.weight"] = load_file(tmp_path / "in" / WEIGHTS)[f"{module}.weight"]

    rewrite(export.folder, keep)
    rewrite_json(export.folder, "config.json", lambda c: c["quantization_config"]["ignore"].append(module))
    rewrite_json(export.folder, "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].append(module))
    refused(export, module, "differ in format")


def test_other_tensors_of_the_original_may_be_carried_over(export: Export, tmp_path: Path) -> None:
    """Only as they are there."""
    extra = {"mtp.layers.0.weight": torch.randn(4, 4)}
    save_file(extra, tmp_path / WEIGHTS)
    rewrite(export.folder, lambda tensors: tensors.update(extra))
    refused(export, "mtp.layers.0.weight is not part of this model")
    assert check(export, original=tmp_path).passed
    rewrite(export.folder, lambda tensors: tensors["mtp.layers.0.weight"].add_(1))
    refused(export, "tensor mtp.layers.0.weight", f"is not that of {tmp_path / WEIGHTS}", original=tmp_path)


CONVERTER = """#!{python}
import shutil, sys
if "{problem}":
    sys.exit("{problem}")
shutil.copy(sys.argv[1] + "/config.json", sys.argv[3])
"""
LLAMA = """
import numpy as np
class Llama:
    def __init__(self, path, n_ctx, logits_all, verbose):
        assert path.endswith(".gguf") and open(path).read() and logits_all
        self.scores = np.load({logits!r})[0]
    def eval(self, ids):
        assert len(ids) == len(self.scores)
"""


@pytest.mark.parametrize(
    ("problem", "noise", "outcome"),
    [("", 0.001, "passed"), ("unknown tokenizer", 0.0, "(unknown tokenizer)"), ("", 0.1, "llama.cpp computes other")],
)
def test_llama_cpp_is_asked_where_it_is_installed(
    problem: str, noise: float, outcome: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins with its interface, since it is not a dependency."""
    logits = export.reference.weight_only_logits
    assert logits is not None
    wrong = noise * logits.std() * np.random.default_rng(0).standard_normal(logits.shape)
    np.save(tmp_path / "logits.npy", logits + wrong)
    (tmp_path / "llama_cpp.py").write_text(LLAMA.format(logits=str(tmp_path / "logits.npy")))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(python=sys.executable, problem=problem))
    script.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if noise > 0.01:
        refused(export, outcome)
    else:
        assert outcome in check(export).readers["llama_cpp"]


def test_a_cache_without_scales_is_under_a_scale_of_one(tmp_path: Path) -> None:
    export = exported("llama", tmp_path, ParallelSizes(), kv_cache="fp8", activations="none")
    check(export)
    names = [name for name in load_file(export.folder / WEIGHTS) if name.endswith(("k_scale", "v_scale"))]
    assert len(names) == 2 * 4
    rewrite(export.folder, lambda tensors: [tensors.pop(name) for name in names[1:]])
    refused(export, "_scale is missing (7 in all)")
    rewrite(export.folder, lambda tensors: tensors.pop(names[0]))
    refused(export, "k_scale is missing, which means a scale of 1")


def test_dynamic_scales_are_said_in_both_files_and_stored_in_none(tmp_path: Path) -> None:
    export = exported("llama", tmp_path, ParallelSizes(), activation_scales="dynamic")
    assert not [name for name in load_file(export.folder / WEIGHTS) if name.endswith("input_scale")]
    config = json.loads((export.folder / "config.json").read_text())["quantization_config"]
    details = json.loads((export.folder / "hf_quant_config.json").read_text())["quantization"]
    assert config["activation_scheme"] == details["activation_scheme"] == "dynamic"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert config["config_groups"]["group_0"]["weights"]["dynamic"] is False
    check(export)
    for name, part in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        rewrite_json(export.folder, name, lambda c, part=part: c[part].update(activation_scheme="static"))
    refused(export, "activation_scheme=static cannot be verified")


def test_a_changed_config_is_found(export: Export) -> None:
    path = export.folder / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    refused(export, f"{path} is missing or changed")


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", "deeper/config.json", ".."])
def test_a_name_that_leads_out_is_not_followed(export: Export, name: str) -> None:
    """By the manifest, then by the index: the file is named and not opened."""
    text = (export.folder / MANIFEST_FILE).read_text()
    manifest = json.loads(text)
    manifest["files"][name] = "0" * 64
    (export.folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    refused(export, MANIFEST_FILE, f"names {name!r}, which is no file of")
    (export.folder / MANIFEST_FILE).write_text(text)
    index = {"weight_map": {"model.norm.weight": name}}
    (export.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(export, "model.safetensors.index.json", f"names {name!r}, which is no file of")


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", MANIFEST_FILE, WEIGHTS])
def test_a_missing_file_is_found(export: Export, name: str) -> None:
    (export.folder / name).unlink()
    refused(export, name)


def test_input_scales_of_another_calibration_are_found_by_the_logits(export: Export) -> None:
    """Sixteen times too small, all alike, and no calibration to compare with: inputs saturate."""

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("input_scale"):
                tensor.div_(16)

    rewrite(export.folder, shrink)
    refused(export, "does not compute the student's logits", input_amax=None)
    refused(export, "q_proj.input_scale is")


def test_logits_of_another_run_are_refused(export: Export, tmp_path: Path) -> None:
    logits = export.reference.reference_logits
    refused(export, "[2, 32, 514]", "[2, 32, 515]", reference_logits=logits[:, :, :-1])
    refused(export, "[2, 31, 515]", weight_only_logits=logits[:, :-1])
    refused(export, "relative error nan", reference_logits=np.full_like(logits, np.nan))
    refused(export, "does not compute", weight_only_logits=logits)
    other = replace(export, tokens=random_tokens(515, batch=2, length=32, seed=9))
    refused(other, "does not compute", report=tmp_path / "verify.json")
    assert json.loads((tmp_path / "verify.json").read_text())["passed"] is False


def test_the_two_implementations_of_the_format_agree() -> None:
    """The verifier's reading and rounding against megaqad.nvfp4, on ties, tiny blocks and saturation too."""
    torch.manual_seed(0)
    grid = torch.arange(-28, 29) / 4.0
    assert torch.equal(
        round_e2m1(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])),
        torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]),
    )
    x = torch.randn(64, 64) * torch.logspace(-6, 1, 64)[:, None]
    x[0, : len(grid)] = grid
    x[1] = 0
    packed = quantize(x)
    ours = read_nvfp4(packed.codes, packed.block_scales, packed.global_scale)
    amax = torch.tensor(3.0)  # smaller than the data: blocks saturate
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype)
        assert torch.equal(round_nvfp4(values, amax / 2688), fake_quantize(values, amax))
    assert torch.equal(ours, fake_quantize(x))
