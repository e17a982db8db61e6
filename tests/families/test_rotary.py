"""Every form of rotary embedding, in every family that transformers gives it to, for short and for long sequences."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaqad.models.blocks.rotary import Tables
from megaqad.models.families import describe_model
from megaqad.models.operations import PLAIN
from tests.families.checkpoints import settings, transformers_model

ORIGINAL = 16
"""Positions of the original training; the forms that depend on the length change beyond it."""
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.5 * index for index in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
FAMILIES = ("llama_biases", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "granite", "olmo2")
CHOSEN = [(case, form, 1.0) for case in (*FAMILIES, "gemma3") for form in FORMS]
CHOSEN += [("phi3", form, share) for form in ("default", "longrope") for share in (1.0, 0.75)]


def rotary_settings(case: str, form: str, share: float) -> dict[str, Any]:
    """config.json of a case that has a form, as its family spells it."""
    rope: dict[str, Any] = {"rope_type": form, "rope_theta": 1e4, **FORMS[form]}
    positions = ORIGINAL if form == "dynamic" else 4 * ORIGINAL  # the dynamic form takes the original number from here
    changes: dict[str, Any] = {"head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": positions}
    if case == "ministral3":
        rope |= {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": ORIGINAL}
    if case == "phi3":
        changes |= {"original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": share}
        for key in ("short_factor", "long_factor"):
            if key in rope:
                rope[key] = rope[key][: int(16 * share) // 2]
    content = settings(case, **changes)
    for old in ("layer_types", "rope_scaling", "rope_theta", "rope_local_base_freq"):
        content.pop(old, None)
    if case == "gemma3":
        return content | {"rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}}
    return content | {"rope_parameters": rope}


def transformers_table(model: nn.Module, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [s, dim] of a layer."""
    kinds = {"gemma3_text": lambda: {"layer_type": model.config.layer_types[layer]}}
    kind = kinds.get(model.config.model_type, dict)()
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1), torch.arange(length)[None], **kind)
    return cos[0], sin[0]


@pytest.mark.parametrize(("case", "form", "share"), CHOSEN)
def test_tables_equal_transformers(case: str, form: str, share: float, tmp_path: Path) -> None:
    content = rotary_settings(case, form, share)
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = transformers_model(content)
    of_layers = [attention.rotary for attention in describe_model(tmp_path).attentions]
    layers = {rotary: layer for layer, rotary in enumerate(of_layers) if rotary is not None}
    assert len(layers) == (2 if case == "gemma3" else 1)
    for length in (ORIGINAL // 2, ORIGINAL, 4 * ORIGINAL):  # growing: transformers' dynamic form keeps the longest
        for rotary, layer in layers.items():
            expected = transformers_table(model, layer, length)
            found = rotary.table(length, torch.float32, torch.device("cpu"))
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape == (length, 1, 1, theirs.shape[-1])
                assert torch.allclose(ours[:, 0, 0], theirs, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_only_dynamic_and_longrope_depend_on_the_length(form: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(rotary_settings("llama_biases", form, 1.0)))
    rotary = describe_model(tmp_path).attentions[0].rotary
    assert rotary is not None
    short, long = (rotary.frequencies(length)[0] for length in (ORIGINAL, ORIGINAL + 1))
    assert torch.equal(short, long) == (form not in {"dynamic", "longrope"})


@pytest.mark.parametrize("case", ["llama_biases", "phi3", "gemma3", "olmo2"])
def test_bf16_rotations_equal_transformers(case: str, tmp_path: Path) -> None:
    """To the bit: most families round cosines and sines, OLMo 2 rotates in FP32."""
    content = rotary_settings(case, "default", 0.75)
    (tmp_path / "config.json").write_text(json.dumps(content))
    rotary = describe_model(tmp_path).attentions[0].rotary
    assert rotary is not None
    x = torch.randn(ORIGINAL, 1, 3, rotary.head_dim, dtype=torch.bfloat16)  # [s, b, n, d]
    tables = Tables()
    tables.length = ORIGINAL
    found = PLAIN.rotate(x, *tables.of(rotary, x.dtype, x.device))
    model = transformers_model(content)
    kind = {"layer_type": model.config.layer_types[0]} if case == "gemma3" else {}
    theirs = x.permute(1, 2, 0, 3)  # [b, n, s, d]
    cos, sin = model.get_decoder().rotary_emb(theirs, torch.arange(ORIGINAL)[None], **kind)
    expected, _ = sys.modules[type(model).__module__].apply_rotary_pos_emb(theirs, theirs, cos, sin)
    assert found.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(found, expected.permute(2, 0, 1, 3))
