"""The compressed-tensors layout is what its library, transformers and the converter from ModelOpt's take it for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaqad.export.client.checkpoint import Client, open_export
from megaqad.export.client.files import VerificationError
from megaqad.export.client.libraries import with_compressed_tensors, with_compressed_tensors_converter
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest
from megaqad.export.reference import StudentReference
from megaqad.export.verify import Verification, verify
from megaqad.runtime.ranks import ParallelSizes
from tests.export.export_runs import calibrate_and_export, verify_on_main
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens
from tests.ranks import run_ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "nvfp4": {},
    "nvfp4 weight only": {"activations": "none"},
    "nvfp4, kv fp8": {"kv_cache": "fp8"},
    "nvfp4, kv fp8 under a scale of 1": {"kv_cache": "fp8_cast"},
    "mse, head": {"calibration": "mse", "weight_scales": "frozen", "exclude": [], "formats": {"lm_head": "fp8"}},
    "fp8": {"weights": "fp8", "activations": "fp8"},
    "fp8, each token's own": {"weights": "fp8", "activations": "fp8", "activation_scales": "dynamic"},
    "mxfp8": {"weights": "mxfp8", "activations": "mxfp8"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp4"},
    "mixed": {"formats": {"*.self_attn.*": "fp8", "*.1.mlp.*": "nvfp4_weight_only", "*.2.mlp.*": "bf16"}},
}
MIXED_WITH_CACHE = {**SETTINGS["mixed"], "kv_cache": "fp8"}
LAYOUTS = [
    ParallelSizes(tensor=2),
    ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
]
CASE = "mxfp_llama"
TOKENS = random_tokens(CASES[CASE]["vocab_size"], batch=2, length=32)


def exported(
    folder: Path, output: Path, sizes: ParallelSizes, settings: dict[str, Any], layout: str = "compressed_tensors"
) -> StudentReference:
    options = {"output_dir": output, "settings": settings, "dtype": torch.float32, "tokens": TOKENS, "layout": layout}
    return run_ranks(sizes.model_ranks, calibrate_and_export, folder, sizes, options)[0]


def check(folder: Path, reference: StudentReference) -> Verification:
    return verify(folder, tokens=TOKENS, **vars(reference))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CASE, tmp_path_factory.mktemp("model") / "in", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def original(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudentReference]:
    """Four formats and a cache, in one export."""
    output = tmp_path_factory.mktemp("export") / "out"
    return output, exported(model, output, ParallelSizes(), MIXED_WITH_CACHE)


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model of the export, which its first forward decompresses."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_reads_the_student(name: str, model: Path, tmp_path: Path) -> None:
    """Nothing missing, every weight the student's as the library decompresses it, its configuration accepted."""
    settings, folder = SETTINGS[name], tmp_path / "ct"
    reference = exported(model, folder, ParallelSizes(), settings)
    assert check(folder, reference).readers["compressed_tensors"] == "passed"
    assert not (folder / "hf_quant_config.json").exists()
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(said).model_dump()
    for group, entry in said["config_groups"].items():
        for kind in ("weights", "input_activations"):
            kept = read["config_groups"][group][kind]
            assert (entry[kind] is None) == (kept is None)
            for key, value in (entry[kind] or {}).items():
                assert str(kept[key]) == str(value), (kind, key)


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [
        ("nvfp4 weight only", torch.bfloat16, 0.02),  # BF16 arithmetic
        ("fp8", torch.float32, 0.1),  # one code flips and others follow: see ``verify.py``
    ],
)
def test_transformers_computes_the_student_s_logits(
    name: str, dtype: torch.dtype, limit: float, model: Path, tmp_path: Path
) -> None:
    reference = exported(model, tmp_path / "ct", ParallelSizes(), SETTINGS[name])
    with torch.no_grad():
        logits = load(tmp_path / "ct", dtype)(torch.from_numpy(TOKENS)).logits.float()
    assert (logits - torch.from_numpy(reference.reference_logits)).norm() / logits.norm() < limit


@pytest.mark.parametrize(
    ("name", "dtype"), [("nvfp4", torch.bfloat16), ("fp8", torch.float32), ("mxfp8", torch.bfloat16)]
)
def test_the_library_rounds_inputs_as_the_student_does(
    name: str, dtype: torch.dtype, model: Path, tmp_path: Path
) -> None:
    exported(model, tmp_path / "ct", ParallelSizes(), SETTINGS[name])
    loaded = load(tmp_path / "ct", dtype)
    with torch.no_grad():
        loaded(torch.from_numpy(TOKENS))
    client = open_export(tmp_path / "ct")
    module = "model.layers.2.self_attn.o_proj"
    layout, theirs = client.layouts[module], dict(loaded.named_modules())[module]
    x = (3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    stored = [] if layout.input_scale is None else [client.tensor(f"{module}.{layout.input_scale}")]
    assert layout.round_input is not None
    expected = layout.round_input(x, *stored)
    found = forward_quantize(theirs, x, "input", theirs.quantization_scheme.input_activations)
    assert (expected != x).float().mean() > 0.5
    # NVFP4: the library divides where the student multiplies, which a value half way between two codes shows
    assert (found != expected).float().mean() <= (0.02 if name == "nvfp4" else 0.0)


def test_as_the_library_converts_modelopt_s_layout(model: Path, tmp_path: Path) -> None:
    exported(model, tmp_path / "modelopt", ParallelSizes(), {}, layout="modelopt")
    exported(model, tmp_path / "ct", ParallelSizes(), {})
    written = load_file(tmp_path / "ct/model.safetensors")
    converter = ModelOptNvfp4Converter(ignore=["lm_head"], targets=["re:.*_proj$"])
    converted = converter.process(load_file(tmp_path / "modelopt/model.safetensors"))
    assert set(written) == set(converted)
    for name, tensor in converted.items():
        assert written[name].dtype is tensor.dtype, name
        # the converter leaves scales 0-dim, which transformers takes for BF16
        assert written[name].shape == (tensor.shape if tensor.dim() else (1,)), name
        assert tensor_digest(written[name]) == tensor_digest(tensor.reshape(written[name].shape)), name


def test_the_same_bytes_from_every_layout(model: Path, original: tuple[Path, StudentReference], tmp_path: Path) -> None:
    """How tensors are divided is the same code for all layouts of the files; this one names and shapes them itself."""
    for index, sizes in enumerate(LAYOUTS):
        exported(model, tmp_path / str(index), sizes, MIXED_WITH_CACHE)
        for path in original[0].iterdir():
            assert (tmp_path / str(index) / path.name).read_bytes() == path.read_bytes(), (sizes, path.name)


def rewritten(original: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The export with other tensors, and checksums to match: an exporter's mistake, not a damaged file."""
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["tensors"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder


def test_the_library_does_not_meddle_with_the_ranks(original: tuple[Path, StudentReference]) -> None:
    """It divides what it decompresses among the ranks of a process group, where it sees one; ours are waiting."""
    results = run_ranks(2, verify_on_main, original[0], TOKENS, original[1])
    assert [readers["compressed_tensors"] for readers in results] == ["passed", "passed"]


def test_other_people_s_readers_find_what_ours_would_not(
    original: tuple[Path, StudentReference], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, and a reader of ours that is wrong about a value: the library says so."""
    exported(model, tmp_path / "modelopt", ParallelSizes(), {}, layout="modelopt")
    weight = Client.weight
    monkeypatch.setattr(Client, "weight", lambda client, module: weight(client, module) * 1.02)
    for folder, reader in (
        (original[0], with_compressed_tensors),
        (tmp_path / "modelopt", with_compressed_tensors_converter),
    ):
        with pytest.raises(VerificationError, match="reads another weight of"):
            reader(open_export(folder), lambda *progress: None)


MLP = "model.layers.0.mlp.gate_proj"
ATTENTION = "model.layers.3.self_attn"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{MLP}.input_global_scale"), [f"{MLP}.input_global_scale is missing"]),
        (lambda t: t.pop(f"{ATTENTION}.k_scale"), [f"{ATTENTION}.k_scale is missing"]),
        (
            lambda t: t.update({f"{MLP}.weight_global_scale": t[f"{MLP}.weight_global_scale"].reshape(())}),
            [f"{MLP}.weight_global_scale is torch.float32 [] instead of torch.float32 [1]"],
        ),
        (
            lambda t: t[f"{MLP}.weight_global_scale"].mul_(1.000001),
            ["weight_global_scale differs among fused modules", "up_proj"],
        ),
        (
            lambda t: t["model.layers.0.mlp.down_proj.input_global_scale"].reciprocal_(),
            ["down_proj.input_global_scale is", "stands for"],
        ),
        (lambda t: t[f"{ATTENTION}.v_scale"].mul_(1.01), [f"{ATTENTION}.v_scale is", "stands for"]),
        (lambda t: t[f"{ATTENTION}.o_proj.input_scale"].mul_(1.01), ["o_proj.input_scale is", "stands for"]),
        (lambda t: t["model.layers.0.mlp.down_proj.weight_global_scale"].mul_(1.01), ["does not compute"]),
    ],
)
def test_an_exporter_s_mistake_is_named(
    original: tuple[Path, StudentReference],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], Any],
    words: list[str],
) -> None:
    folder = rewritten(original[0], tmp_path / "changed", change)
    with pytest.raises(VerificationError) as caught:
        check(folder, original[1])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32), "cannot be verified"),
        (lambda q: q["config_groups"]["group_0"].update(input_activations=None), "cannot be verified"),
        (lambda q: q["config_groups"]["group_1"]["targets"].append(q["ignore"][0]), "two things of"),
        (lambda q: q["config_groups"]["group_0"]["targets"].pop(), "neither quantizes nor ignores"),
        (lambda q: q.update(format="float-quantized"), "format=float-quantized"),
        (lambda q: q.update(quantization_status="frozen"), "quantization_status=frozen"),
        (lambda q: q["kv_cache_scheme"].update(dynamic=True), "kv_cache_scheme="),
        (lambda q: q.pop("ignore"), "lack 'ignore'"),
        (lambda q: q.update(quant_method="awq"), "quant_method=awq"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(
    original: tuple[Path, StudentReference], tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(original[0], folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"]["config.json"] = file_digest(folder / "config.json")
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=words):
        check(folder, original[1])
