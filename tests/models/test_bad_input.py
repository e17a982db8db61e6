"""Every broken checkpoint and impossible layout is refused with one line that names the value and the way out."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.errors import UserError
from megaqad.models.checkpoint_files import read_headers
from megaqad.models.checks import check_checkpoint, check_layout, check_sequence_length
from megaqad.models.encodings import Checkpoint
from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("original"), dtype=torch.bfloat16)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "removed"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def check(folder: Path) -> None:
    check_checkpoint(describe_model(folder), folder)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def test_the_original_is_accepted(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": [], "model_type": "bloom"}, ["bloom", "LlamaForCausalLM"]),
        ({"hidden_size": 0}, ["hidden_size=0", "positive"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers=None"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers=1000000000"]),
        ({"attention_bias": True}, ["lacks model.layers.0.self_attn.q_proj.bias"]),
        ({"hidden_act": "tanh"}, ["hidden_act='tanh'"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["config.json", "factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["config.json", "freq_factor"]),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, ["rope_type='mrope'", "yarn"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, ["rope_type=default", "not finite"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ["factor=0.5"]),
        ({"head_dim": 15}, ["16 dims", "head_dim=15", "even"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads=0", "positive"]),
        ({"is_causal": False}, ["is_causal=false"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"vocab_size": 512}, ["515 rows", "vocab_size=512"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight differs", "tie_word_embeddings=false"]),
        ({"num_hidden_layers": 3}, ["model.layers.3.", "and 6 more", "LlamaForCausalLM"]),
        ({"num_hidden_layers": 5}, ["lacks model.layers.4."]),
        ({"intermediate_size": 90}, ["gate_proj", "[96, 64]", "[90, 64]"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_that_does_not_fit(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_config(folder, **changes)
    refused(folder, *words)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_config_that_is_not_json(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json", "restore")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["lacks model.norm.weight"]),
        (lambda t: t.pop("lm_head.weight"), ["lacks lm_head.weight", "tie_word_embeddings=true"]),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}),
            ["model.layers.0.self_attn.q_proj.bias", "LlamaForCausalLM"],
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), ["model.norm.weight", "[63]", "[64]"]),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.uint8)}),
            ["model.norm.weight", "U8", "BF16"],
        ),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict], Any], words: list[str]) -> None:
    edit_tensors(folder, change)
    refused(folder, *words)


def test_old_rotary_buffers_and_a_repeated_tied_head_are_fine(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    edit_tensors(folder, change)
    check(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    refused(folder, "model.safetensors is")
    if keep == -1:
        refused(folder, "truncated", f"{len(content) - 1} bytes instead of {len(content)}")


def test_bytes_appended(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(folder, "longer than its header says")


@pytest.mark.parametrize(
    "header", [b"not json", b"[]", b'{"a": {}}', b'{"a": 1}', b'{"a":{"dtype":"F32","shape":[1]}}']
)
def test_broken_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "is not a safetensors file")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor", "copy the missing files")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    refused(folder, "holds its weights in pytorch_model.bin, which is not read", "save_pretrained")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(folder, "holds model-00001-of-00002.safetensors without model.safetensors.index.json", "copy the index")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../model.safetensors", ["'../model.safetensors' outside"]),
        ("/etc/model.safetensors", ["'/etc/model.safetensors' outside"]),
        ("absent.safetensors", ["absent.safetensors does not exist"]),
    ],
)
def test_index_that_points_elsewhere(folder: Path, file: str, words: list[str]) -> None:
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, *words)


def split(folder: Path, *, keep_single: bool = False) -> dict[str, str]:
    """The weights in two files; what an index says of them."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
    if not keep_single:
        (folder / "model.safetensors").unlink()
    return {name: file for file, mine in halves.items() for name in mine}


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_need_not_be_exact(folder: Path) -> None:
    """It names files; what they hold decides, as in transformers."""
    weight_map = split(folder)
    first, second, *_ = weight_map
    del weight_map[first]
    write_index(folder, weight_map | {"phantom": "a.safetensors", second: "b.safetensors"})
    check_checkpoint(describe_model(folder), folder)
    assert len(read_headers(folder)) == len(weight_map) + 1


def test_what_the_model_needs_must_be_there(folder: Path) -> None:
    weight_map = split(folder)
    tensors = load_file(folder / "a.safetensors")
    gone = tensors.popitem()[0]
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    write_index(folder, weight_map)
    refused(folder, f"lacks {gone}")


def test_a_tensor_in_two_files(folder: Path) -> None:
    weight_map = split(folder)
    shutil.copy(folder / "a.safetensors", folder / "c.safetensors")
    write_index(folder, weight_map | {"more": "c.safetensors"})
    assert {entry.file.name for entry in read_headers(folder).values()} == {"a.safetensors", "b.safetensors"}
    twice = next(name for name, file in weight_map.items() if file == "a.safetensors")
    del weight_map[twice]
    write_index(folder, weight_map | {"more": "c.safetensors"})
    refused(folder, f"{twice} is in", "a.safetensors and in c.safetensors, and", "names neither")


def test_one_file_beside_an_index(folder: Path) -> None:
    """transformers takes the single file, engines what the index names."""
    write_index(folder, split(folder, keep_single=True))
    refused(folder, "holds model.safetensors, which transformers reads, and model.safetensors.index.json with other")
    (folder / "b.safetensors").unlink()
    assert {entry.file.name for entry in read_headers(folder).values()} == {"model.safetensors"}
    note = Checkpoint(folder).note
    assert note is not None
    assert "model.safetensors is read; model.safetensors.index.json beside it names b.safetensors, which is" in note


def test_a_header_that_contradicts_the_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"BF16"', b'"F32" ', 1))
    refused(folder, "is not a safetensors file")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "is not a safetensors index")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (ParallelSizes(tensor=3), ["parallel.tensor=3", "hidden_size=64"]),
        (ParallelSizes(tensor=8), ["parallel.tensor=8", "4 attention heads", "choose one of 1, 2, 4"]),
        (ParallelSizes(pipeline=5), ["parallel.pipeline=5", "4 layers"]),
        (ParallelSizes(virtual_pipeline=2), ["parallel.virtual_pipeline=2", "parallel.pipeline=2"]),
        (ParallelSizes(pipeline=2, virtual_pipeline=4), ["parallel.virtual_pipeline=4", "4 layers"]),
        (ParallelSizes(expert=2), ["parallel.expert=2", "LlamaForCausalLM", "none"]),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit(original: Path, sizes: ParallelSizes, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(describe_model(original), sizes)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_heads_that_do_not_group(folder: Path) -> None:
    edit_config(folder, num_key_value_heads=3)
    with pytest.raises(UserError, match="4 attention heads are no multiple of 3 key/value heads"):
        check_layout(describe_model(folder), ParallelSizes())


def test_sequence_lengths(folder: Path) -> None:
    architecture = describe_model(folder)
    check_sequence_length(architecture, 128, ParallelSizes())
    with pytest.raises(UserError, match=r"sequence_length=129 .* max_position_embeddings=128"):
        check_sequence_length(architecture, 129, ParallelSizes())
    with pytest.raises(UserError, match=r"sequence_length=63 among parallel.tensor=2"):
        check_sequence_length(architecture, 63, ParallelSizes(tensor=2, sequence=True))
