"""Small random checkpoints of every dense family, written with the config.json that a case gives, and what transformers
computes from them.

Weights are an order of magnitude larger than at initialisation, norms and biases away from one and zero, so that a
mistake in any of them shows in the logits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LENGTH = 48
"""Tokens of the tests' sequences: more than the windows and than the original positions below."""
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 0.5 * index for index in range(8)],
}
CASES: dict[str, dict[str, Any]] = {
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "mistral": {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 1},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 20,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "attention_bias": True, "num_key_value_heads": 4},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 16, "num_key_value_heads": 1},
    "phi3_long": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 32,
        "tie_word_embeddings": True,
    },
    "phi3_three_heads": {
        "model_type": "phi3",
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
    },
    "gemma3": {  # as on the hub
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "tie_word_embeddings": True,
    },
    "gemma3_one_group": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "smollm3_biases": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.125,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    "granite_three_heads": {
        "model_type": "granite",
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.1,
        "logits_scaling": 10.0,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo2_one_group": {"model_type": "olmo2", "num_key_value_heads": 1, "attention_bias": True},
    "olmo2_three_heads": {
        "model_type": "olmo2",
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    },
}
"""What config.json says beside ``SIZES``."""
ADDED = ("ministral3", "phi3", "gemma3", "smollm3", "granite", "olmo2")
"""One case of each family whose divisions are tested here."""


def settings(case: str, **changes: Any) -> dict[str, Any]:
    """The content of config.json."""
    return {**SIZES, **CASES[case], **changes}


def transformers_model(content: dict[str, Any], model_type: str | None = None) -> nn.Module:
    """transformers' model of a config.json, at its initialisation."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type or content["model_type"]].from_dict(json.loads(json.dumps(content)))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.1
            parameter.copy_(parameter + noise if "norm" in name else noise)


def save(model: nn.Module, content: dict[str, Any], folder: Path, **options: Any) -> Path:
    """As transformers writes it, with this config.json."""
    model.save_pretrained(folder, **options)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def make_checkpoint(
    case: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **changes: Any
) -> Path:
    content = settings(case, dtype=str(dtype).removeprefix("torch."), **changes)
    model = transformers_model(content)
    randomize(model)
    content["architectures"] = [type(model).__name__]
    return save(model.to(dtype), content, folder, max_shard_size=shard_size)


def random_tokens(vocab_size: int, batch: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab_size, (batch, length))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
def transformers_logits(folder: Path, tokens: np.ndarray) -> Tensor:
    """FP32 logits [b, s, V] of what transformers makes of a checkpoint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(torch.from_numpy(tokens)).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the element that is furthest off, to the largest that is expected."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()
