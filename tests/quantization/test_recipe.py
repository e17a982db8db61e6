"""Patterns on Hugging Face names decide what is quantized; what engines fuse stays together."""

import pytest

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.settings import QuantizationSettings

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
] + ["lm_head"]


def quantized(**settings):
    return set(Recipe(QuantizationSettings(**settings), MODULES).quantized_modules())


def test_the_default_quantizes_all_but_the_head():
    assert quantized() == set(MODULES) - {"lm_head"}


def test_patterns_match_whole_names():
    only_layer_1 = quantized(include=["model.layers.1.*"], exclude=[])
    assert only_layer_1 == {name for name in MODULES if name.startswith("model.layers.1.")}
    assert "model.layers.11.mlp.down_proj" not in only_layer_1


def test_exclusion_wins_over_inclusion():
    kept = quantized(include=["*"], exclude=["lm_head", "*.self_attn.*"])
    assert kept == {name for name in MODULES if "down_proj" in name}


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_weight_only", "nvfp4_attention_bf16", "none"])
def test_shipped_recipes_resolve(name):
    settings = load_settings([f"quantization={name}"]).quantization
    chosen = Recipe(settings, MODULES).quantized_modules()
    assert ("model.layers.0.self_attn.q_proj" in chosen) == (name in ("nvfp4", "nvfp4_weight_only"))
    assert ("model.layers.0.mlp.down_proj" in chosen) == (name != "none")
    assert settings.activations == ("nvfp4" if name in ("nvfp4", "nvfp4_attention_bf16") else "none")
    assert "lm_head" not in chosen


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"exclude pattern '\*\.gate' matches no linear module"):
        quantized(exclude=["lm_head", "*.gate"])


def test_activations_without_weights_are_refused():
    with pytest.raises(UserError, match="no engine kernel"):
        QuantizationSettings(weights="none", activations="nvfp4")
