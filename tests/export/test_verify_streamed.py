"""verify one layer at a time: the logits of the whole model, the same findings, the memory of a layer."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaqad.export import verify as verification
from megaqad.export.client import model as model_module
from megaqad.export.client.checkpoint import open_export
from megaqad.export.client.model import StreamedModel, WholeModel, round_activations
from megaqad.export.manifest import MANIFEST_FILE, tensor_digest
from megaqad.export.reference import StudentReference
from megaqad.export.verify import VerificationError, verify
from megaqad.runtime.ranks import ParallelSizes
from tests.export.export_runs import calibrate_and_export
from tests.models.checkpoints import COMMON, make_checkpoint, random_tokens
from tests.ranks import run_ranks

VOCABULARY = 257
TOKENS = random_tokens(VOCABULARY, batch=3, length=40)
EXPERTS = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    # a tied head, and biases
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}),
    # an embedding that scales, two rotary embeddings, windows, caps on logits
    "gemma3": (
        "gemma3_text",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2": (
        "gemma2",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "attn_logit_softcapping": 2.0},
    ),
    "granite": ("granite", {"num_attention_heads": 4, "num_key_value_heads": 2, "logits_scaling": 3.0}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "num_experts": 6, "mlp_only_layers": [0]}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "mixtral": ("mixtral", {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}),
}


def nothing(doing: str, done: int, total: int) -> None:
    pass


def checkpoint(family: str, folder: Path) -> Path:
    """A BF16 checkpoint as transformers writes it, of large random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, "vocab_size": VOCABULARY, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (1 if "norm" in name and "gemma" not in kind else 0))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def transformers_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(torch.from_numpy(TOKENS)).logits


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by itself: a file that is not quantized is an export too."""
    monkeypatch.setattr(model_module, "TOKENS_AT_ONCE", 50)
    client = open_export(checkpoint(family, tmp_path / "in"))
    expected = transformers_logits(tmp_path / "in")
    for kind in (StreamedModel, WholeModel):
        model = kind(client, torch.float32, nothing)
        for _ in range(2):  # what was taken away is given again
            logits = list(model.logits(torch.from_numpy(TOKENS)))
            assert [len(one) for one in logits] == ([50, 50, 20] if kind is StreamedModel else [40, 40, 40])
            assert distance(torch.cat(logits), expected.flatten(0, 1)) < 1e-6


def test_only_one_part_has_weights(tmp_path: Path) -> None:
    """While a layer computes, every other one is empty; after a forward all are."""
    client = open_export(checkpoint("qwen3_moe", tmp_path / "in"))
    filled: list[set[str]] = []

    def look(doing: str, done: int, total: int) -> None:
        parameters = streamed.module.model.named_parameters()
        filled.append({".".join(name.split(".")[:2]) for name, one in parameters if one.device.type != "meta"})

    streamed = StreamedModel(client, torch.float32, look)
    list(streamed.logits(torch.from_numpy(TOKENS)))
    assert filled == [{"embed_tokens.weight"}, *({f"layers.{layer}"} for layer in range(4)), {"norm.weight"}]
    assert all(parameter.device.type == "meta" for parameter in streamed.module.parameters())


def exported(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> StudentReference:
    """``folder/out``, quantized from ``folder/in``; logits in ``dtype``."""
    checkpoint(family, folder / "in")
    options = {
        "output_dir": folder / "out",
        "settings": settings,
        "dtype": dtype,
        "compare_in": dtype,
        "tokens": TOKENS,
    }
    return run_ranks(1, calibrate_and_export, folder / "in", ParallelSizes(), options)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudentReference]:
    folder = tmp_path_factory.mktemp("llama")
    return folder / "out", exported("llama", folder, kv_cache="fp8")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudentReference]:
    folder = tmp_path_factory.mktemp("experts")
    return folder / "out", exported("qwen3_moe", folder)


@pytest.mark.parametrize("export", ["llama", "experts"])
def test_rounded_logits_are_those_of_the_whole_model(export: str, request: pytest.FixtureRequest) -> None:
    folder, reference = request.getfixturevalue(export)
    client, logits = open_export(folder), []
    for kind in (StreamedModel, WholeModel):
        model = kind(client, torch.float32, nothing)
        round_activations(client, model.module)
        logits.append(torch.cat(list(model.logits(torch.from_numpy(TOKENS)))))
    assert distance(*logits) < 1e-6
    assert distance(logits[0], torch.from_numpy(reference.reference_logits).flatten(0, 1)) < 1e-6
    assert distance(logits[0], torch.from_numpy(reference.weight_only_logits).flatten(0, 1)) > 0.1


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The export with other tensors and checksums to match: an exporter's defect."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((target / MANIFEST_FILE).read_text())
    manifest["tensors"] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    (target / MANIFEST_FILE).write_text(json.dumps(manifest))
    return target


def swap_experts(tensors: dict[str, Tensor]) -> None:
    for kind in ("weight", "weight_scale", "weight_scale_2"):
        names = [f"model.layers.2.mlp.experts.{expert}.down_proj.{kind}" for expert in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


Q, UP, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.experts.3.up_proj", "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize("mode", ["full", "streamed", "files"])
@pytest.mark.parametrize(
    ("export", "change", "words"),
    [
        ("llama", lambda t: t[f"{DOWN}.input_scale"].mul_(1.01), f"{DOWN}.input_scale is"),
        ("llama", lambda t: t["model.layers.3.self_attn.v_proj.v_scale"].mul_(1.01), "v_scale is"),
        ("llama", lambda t: t.pop(f"{Q}.input_scale"), f"{Q}.input_scale is missing"),
        ("experts", lambda t: t.pop(f"{UP}.weight_scale_2"), f"{UP}.weight_scale_2 is missing"),
        ("experts", lambda t: t[f"{UP}.weight_scale_2"].mul_(1.01), "weight_scale_2 differs among fused modules"),
    ],
)
def test_what_files_tell_is_found_in_every_mode(
    export: str, change: Callable[[dict[str, Tensor]], Any], words: str, mode: str, request: Any, tmp_path: Path
) -> None:
    folder, reference = request.getfixturevalue(export)
    with pytest.raises(VerificationError) as caught:
        verify(changed(folder, tmp_path / "out", change), tokens=TOKENS, model=mode, **vars(reference))
    assert words in str(caught.value)


@pytest.mark.parametrize("mode", ["full", "streamed"])
@pytest.mark.parametrize(
    ("export", "change"),
    [
        ("llama", lambda t: t[f"{DOWN}.weight_scale_2"].mul_(1.01)),
        ("llama", lambda t: t["model.embed_tokens.weight"][TOKENS[0, 0]].mul_(1.1)),
        ("llama", lambda t: t["model.norm.weight"][3].add_(0.1)),
        ("experts", swap_experts),
        ("experts", lambda t: t["model.layers.2.mlp.gate.weight"][0].mul_(-1)),
    ],
)
def test_a_wrong_weight_shows_in_the_logits(
    export: str, change: Callable[[dict[str, Tensor]], Any], mode: str, request: Any, tmp_path: Path
) -> None:
    folder, reference = request.getfixturevalue(export)
    with pytest.raises(VerificationError, match="does not compute the student's logits"):
        verify(changed(folder, tmp_path / "out", change), tokens=TOKENS, model=mode, **vars(reference))


def test_without_logits_nothing_is_run(llama: tuple[Path, StudentReference], tmp_path: Path) -> None:
    folder, reference = llama
    without = {**vars(reference), "reference_logits": None, "weight_only_logits": None}
    found = verify(folder, tokens=TOKENS, model="files", report=tmp_path / "verify.json", **without)
    assert found.passed
    assert found.readers["transformers"] == "skipped: verify.model=files"
    assert found.readers["scales"] == "passed"
    assert found.model is found.relative_error is None
    assert "no logits were compared" in json.loads((tmp_path / "verify.json").read_text())["summary"]


@pytest.mark.parametrize(("room", "chosen"), [(3.001, "full"), (2.999, "streamed")])
def test_the_whole_model_is_run_where_a_third_of_the_memory_holds_it(
    room: float, chosen: str, llama: tuple[Path, StudentReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = llama
    size = sum(4 * tensor.numel() for tensor in load_file(folder.parent / "in/model.safetensors").values())
    monkeypatch.setattr(verification, "available_memory", lambda: int(room * size))
    found = verify(folder, tokens=TOKENS, **vars(reference))
    assert (found.model, found.arithmetic) == (chosen, "float32")
    assert found.relative_error is not None
    assert found.relative_error < 1e-5


def test_large_models_are_compared_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tells right from wrong, if not nearly right from right."""
    assert verification.arithmetic(70_000_000_000) is torch.bfloat16
    assert verification.arithmetic(8_000_000_000) is torch.float32
    folder = tmp_path / "out"
    reference = exported("llama", tmp_path, torch.bfloat16)
    found = verify(folder, tokens=TOKENS, model="streamed", **vars(reference))
    assert found.arithmetic == "bfloat16"
    assert found.weights_relative_error is not None
    assert 1e-4 < found.weights_relative_error < 0.03

    def swap_nibbles(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"{DOWN}.weight"]
        tensors[f"{DOWN}.weight"] = (codes << 4) | (codes >> 4)

    with pytest.raises(VerificationError, match="does not compute"):
        verify(changed(folder, tmp_path / "x", swap_nibbles), tokens=TOKENS, model="streamed", **vars(reference))


MEASURE = """
import sys
from pathlib import Path
import torch
from megaqad.export.client.checkpoint import open_export
from megaqad.export.client.model import StreamedModel, WholeModel
from benchmarks.measure import resident

def peak():
    return resident("VmHWM")

torch.set_num_threads(1)
client = open_export(Path(sys.argv[1]))
tokens = torch.arange(64)[None]
for kind in (StreamedModel, WholeModel):
    before = peak()
    for logits in kind(client, torch.float32, lambda *progress: None).logits(tokens):
        assert bool(logits.isfinite().all())
    print(peak() - before)
"""


def test_the_memory_of_a_layer(tmp_path: Path) -> None:
    """Of 24 layers of 13 MB, in files of 20 MB: the one that is read last stays mapped."""
    layers, size = 24, {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    folder = make_checkpoint(
        "llama", tmp_path / "in", dtype=torch.bfloat16, shard_size="20MB", num_hidden_layers=layers, **size
    )
    client = open_export(folder)
    parameters = (one for name, one in client.parameters.items() if name.startswith("model.layers.0."))
    layer = 4 * sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    streamed, whole = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert whole > (layers - 3) * layer  # the measure sees what is there to be seen
    assert streamed < 6 * layer
