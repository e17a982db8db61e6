"""Experts: logits of transformers, gradients of one rank and the same exported bytes, however they are divided."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import random_tokens, transformers_logits
from tests.models.expert_runs import exported, gradients, logits
from tests.ranks import run_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    # an odd number of heads for each key/value head, a dense layer among those with experts
    "qwen3_moe": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "vocab_size": 257,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LAYOUTS = {
    "one": ParallelSizes(),
    "TP 2": ParallelSizes(tensor=2),
    "EP 2": ParallelSizes(expert=2),
    "TP 2 SP EP 2": ParallelSizes(tensor=2, sequence=True, expert=2),
    "TP 2 EP 2": ParallelSizes(tensor=2, expert=2),
    "PP 2": ParallelSizes(pipeline=2),
}
W4A4 = {"weights": "nvfp4", "activations": "nvfp4"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for name, settings in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON | settings), dtype=torch.float32)
        with torch.no_grad():
            for tensor, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape) * 0.1
                parameter.copy_(1 + noise if "norm" in tensor else noise)
        model.save_pretrained(folders[name])
    return folders


def ranks_of(sizes: ParallelSizes) -> int:
    return sizes.tensor * sizes.pipeline * sizes.expert


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(checkpoints: dict[str, Path], family: str, layout: str) -> None:
    sizes, tokens = LAYOUTS[layout], random_tokens(COMMON["vocab_size"], 4, 32)
    expected = transformers_logits(checkpoints[family], tokens)
    found = [
        part for part in run_ranks(ranks_of(sizes), logits, checkpoints[family], sizes, tokens) if part is not None
    ]
    replicas = [torch.cat(found[first : first + sizes.tensor], dim=-1) for first in range(0, len(found), sizes.tensor)]
    together = torch.cat(replicas)
    assert (together - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("recipe", [None, W4A4], ids=["plain", "W4A4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_training_does_not_depend_on_the_layout(
    checkpoints: dict[str, Path], family: str, recipe: dict[str, Any] | None
) -> None:
    """Gradients of every tensor, the loss and the norm."""
    tokens = random_tokens(COMMON["vocab_size"], 4, 32)
    (whole,) = run_ranks(1, gradients, checkpoints[family], ParallelSizes(), tokens, recipe)
    tensors = {name.split("@")[0]: value for name, value in whole.items()}
    for layout in ("TP 2", "EP 2", "TP 2 SP EP 2", "TP 2 EP 2"):
        sizes = LAYOUTS[layout]
        # Rounding to four bits turns a difference in the last bit into one of a code, and that into other gradients.
        limit = 2e-5 if recipe is None else 0.1
        for part in run_ranks(ranks_of(sizes), gradients, checkpoints[family], sizes, tokens, recipe):
            for name, value in part.items():
                key, _, place = name.partition("@")
                expected = tensors[key]
                if place:
                    starts = json.loads(place)
                    expected = expected[tuple(slice(a, a + n) for a, n in zip(starts, value.shape, strict=True))]
                error = (value - expected).abs().max() / expected.abs().max()
                assert error <= limit, (layout, name, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_the_same_bytes(checkpoints: dict[str, Path], family: str, tmp_path: Path) -> None:
    manifests = {}
    for layout in ("one", "TP 2", "EP 2", "PP 2", "TP 2 EP 2"):
        sizes = LAYOUTS[layout]
        target = tmp_path / layout.replace(" ", "_")
        found = run_ranks(ranks_of(sizes), exported, checkpoints[family], sizes, W4A4, target)
        manifests[layout] = json.loads(found[0])["tensors"]
    for layout, manifest in manifests.items():
        assert manifest == manifests["one"], layout
    routers = [name for name in manifests["one"] if "gate.weight" in name and "experts." not in name]
    assert routers
    assert np.all([not name.endswith("gate.weight_scale") for name in manifests["one"]])
