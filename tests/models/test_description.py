"""config.json files are read to the model that transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaqad.models.blocks.attention import Attention
from megaqad.models.families import describe_model, families
from megaqad.models.stages import chunk_layers, chunk_lengths, stage_of_layer
from megaqad.runtime.sizes import ParallelSizes
from tests.models.checkpoints import CASES, hf_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def attention(folder: Path, **config: Any) -> Attention:
    (folder / "config.json").write_text(json.dumps({**BASE, **config}))
    return describe_model(folder).attentions[-1]


def test_both_homes_of_rope_settings(tmp_path: Path) -> None:
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = attention(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers}).rotary
    new = attention(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers}).rotary
    assert old is not None
    assert new is not None
    assert old.frequencies(64)[0].tolist() == new.frequencies(64)[0].tolist()
    for theta, config in ((123.0, {"rope_theta": 123.0, "rope_scaling": None}), (10_000.0, {})):
        rotary = attention(tmp_path, **config).rotary
        assert rotary is not None
        assert rotary.theta == theta


def test_the_file_is_kept_as_it_was_read(tmp_path: Path) -> None:
    """transformers completes what it parses; exports write the original's settings."""
    content = {**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert describe_model(tmp_path).config == content


@pytest.mark.parametrize(("key", "value"), [("architectures", ["LLaMAForCausalLM"]), ("hidden_act", "swish")])
def test_spellings_of_published_files(key: str, value: Any, tmp_path: Path) -> None:
    assert attention(tmp_path, model_type="llama", **{key: value}).heads == 4


def test_windows_that_no_layer_uses(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4, "sliding_window": 8}
    assert attention(tmp_path, **qwen).window is None
    assert attention(tmp_path, **qwen, use_sliding_window=True, max_window_layers=2).window is None
    assert attention(tmp_path, **qwen, use_sliding_window=True, max_window_layers=1).window == 8
    types = ["full_attention", "full_attention"]
    assert attention(tmp_path, **qwen, use_sliding_window=True, layer_types=types).window is None


@pytest.mark.parametrize("case", CASES)
def test_the_description_names_every_tensor_of_transformers(case: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = hf_config(case)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    architecture = describe_model(tmp_path)
    assert architecture.tensors == expected
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(architecture.linear_modules) == linears - {"lm_head"}


def test_families_are_found_by_themselves() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"} <= set(families())
    assert all(family.architecture.endswith("ForCausalLM") for family in families().values())


@pytest.mark.parametrize(("layers", "chunks"), [(126, 4), (5, 2), (7, 4), (3, 3), (61, 16)])
def test_every_layer_is_on_one_stage(layers: int, chunks: int) -> None:
    lengths = chunk_lengths(layers, chunks)
    assert sum(lengths) == layers
    assert max(lengths) - min(lengths) <= 1
    if 0 < layers % chunks <= chunks - 2:  # the first has the embedding too, the last the head
        assert lengths[0] == lengths[-1] == min(lengths)
    for virtual in (1, 2) if layers >= 2 * chunks else (1,):
        sizes = ParallelSizes(pipeline=chunks, virtual_pipeline=virtual)
        places = [(rank, stage) for stage in range(virtual) for rank in range(chunks)]
        assert [layer for place in places for layer in chunk_layers(layers, sizes, *place)] == list(range(layers))
        assert len(stage_of_layer(layers, sizes)) == layers
