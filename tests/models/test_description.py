"""config.json files as transformers 4 and 5 write them are read to the same description."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaqad.models.description import Llama3RopeScaling, describe_model
from megaqad.models.families import FAMILIES
from megaqad.models.rows import hf_tensors, linear_sites
from tests.models.checkpoints import CASES, hf_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def described(folder: Path, **config: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**BASE, **config}))
    return describe_model(folder)


def test_importing_the_description_imports_no_torch() -> None:
    code = (
        "import sys, megaqad.models.description, megaqad.models.checks, megaqad.models.checkpoint_files\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_homes_of_rope_settings(tmp_path: Path) -> None:
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = described(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers})
    new = described(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers})
    assert old.rope_theta == new.rope_theta == 5e5
    assert old.rope_scaling == new.rope_scaling == Llama3RopeScaling(**numbers)
    assert described(tmp_path, rope_theta=123.0, rope_scaling=None).rope_theta == 123.0
    assert described(tmp_path).rope_theta == 10_000.0


@pytest.mark.parametrize("case", CASES)
def test_the_description_is_what_transformers_reads(case: str, tmp_path: Path) -> None:
    config = hf_config(case)
    config.architectures = [FAMILIES[config.model_type].architecture]
    config.save_pretrained(tmp_path)
    description = describe_model(tmp_path)
    head_dim = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    assert description.head_dim == head_dim
    assert description.num_kv_heads == config.num_key_value_heads
    assert description.tied_embeddings == config.tie_word_embeddings
    assert description.norm_eps == config.rms_norm_eps
    assert description.rope_theta == config.rope_parameters["rope_theta"]
    assert description.sliding_window == vars(config).get("sliding_window")


def test_silent_configs_take_the_class_defaults(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for family in FAMILIES.values():
        small = {key: value for key, value in BASE.items() if key != "architectures"}
        if "num_key_value_heads" in family.defaults:
            small["num_attention_heads"] = 32
        ours = described(tmp_path, **{**small, "architectures": [family.architecture]})
        theirs = AutoConfig.for_model(family.name, **small)
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.tied_embeddings == theirs.tie_word_embeddings
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.sliding_window == vars(theirs).get("sliding_window"), family.name
        if vars(theirs).get("head_dim"):
            assert ours.head_dim == theirs.head_dim


def test_windows_that_no_layer_uses(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4, "sliding_window": 8}
    assert described(tmp_path, **qwen).sliding_window is None
    assert described(tmp_path, **qwen, use_sliding_window=True, max_window_layers=2).sliding_window is None
    assert described(tmp_path, **qwen, use_sliding_window=True, max_window_layers=1).sliding_window == 8
    types = ["full_attention", "full_attention"]
    assert described(tmp_path, **qwen, use_sliding_window=True, layer_types=types).sliding_window is None


@pytest.mark.parametrize("case", CASES)
def test_the_table_names_every_tensor_of_transformers(case: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = hf_config(case)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    description = describe_model(tmp_path)
    assert hf_tensors(description) == expected
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    sites = [site for layer in range(description.num_layers) for site in linear_sites(description, layer).values()]
    assert {name for site in sites for name in site.hf_modules} == linears - {"lm_head"}
