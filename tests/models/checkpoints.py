"""Small random Hugging Face checkpoints, and the logits that transformers computes from them.

Weights are drawn an order of magnitude larger than at initialisation, norms and biases away from one and zero, so
that a mistake in any of them shows in the logits.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    # head_dim x heads != hidden, an odd vocabulary
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 515},
    "llama_tied_scaled": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 101,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_three_groups": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 130,
        "num_hidden_layers": 2,
    },
    # layers that do not divide by the stages, one key/value head for each pair of ranks
    "llama_five_layers": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 5,
        "vocab_size": 103,
    },
    # every dim a multiple of 32 on two ranks
    "mxfp_llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 130},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "sliding_window": 64},
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 515, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 257},
}
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}


def hf_config(case: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    settings = {**COMMON, **CASES[case], **changes, "attn_implementation": "eager"}
    return AutoConfig.for_model(case.removeprefix("mxfp_").split("_", maxsplit=1)[0], **settings)


def make_checkpoint(
    case: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """A checkpoint as ``save_pretrained`` of transformers writes it; ``changes`` are made to its config."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(case, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.1
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def random_tokens(vocab_size: int, batch: int = 4, length: int = 48, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length))


@torch.no_grad()
def transformers_logits(folder: Path, tokens: np.ndarray) -> Tensor:
    """FP32 logits [b, s, V] of the plain transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(torch.from_numpy(tokens)).logits
