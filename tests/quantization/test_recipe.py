"""Patterns on Hugging Face names decide what is quantized; what engines fuse stays together."""

import pytest

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.models.families import describe_model
from megaqad.quantization.modelopt_recipe import translate
from megaqad.quantization.plan import choose_formats, plan_for
from megaqad.quantization.settings import QuantizationSettings
from tests.export.modelopt_fixture import FP8, MXFP4, MXFP8, NVFP4
from tests.models.checkpoints import hf_config, make_checkpoint

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
] + ["lm_head"]


def quantized(**settings):
    return set(choose_formats(QuantizationSettings(**settings), MODULES))


def test_the_default_quantizes_all_but_the_head():
    assert quantized() == set(MODULES) - {"lm_head"}


def test_patterns_match_whole_names():
    only_layer_1 = quantized(include=["model.layers.1.*"], exclude=[])
    assert only_layer_1 == {name for name in MODULES if name.startswith("model.layers.1.")}
    assert "model.layers.11.mlp.down_proj" not in only_layer_1


def test_exclusion_wins_over_inclusion():
    kept = quantized(include=["*"], exclude=["lm_head", "*.self_attn.*"])
    assert kept == {name for name in MODULES if "down_proj" in name}


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_weight_only", "nvfp4_attention_bf16", "nvfp4_kv_fp8", "none"])
def test_shipped_recipes_resolve(name):
    settings = load_settings([f"quantization={name}"]).quantization
    chosen = choose_formats(settings, MODULES)
    assert ("model.layers.0.self_attn.q_proj" in chosen) == (name in ("nvfp4", "nvfp4_weight_only", "nvfp4_kv_fp8"))
    assert ("model.layers.0.mlp.down_proj" in chosen) == (name != "none")
    assert settings.activations == ("nvfp4" if name in ("nvfp4", "nvfp4_attention_bf16", "nvfp4_kv_fp8") else "none")
    assert "lm_head" not in chosen


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"exclude pattern '\*\.gate' matches no linear module"):
        quantized(exclude=["lm_head", "*.gate"])


def test_activations_without_weights_are_refused():
    with pytest.raises(UserError, match="no engine kernel"):
        QuantizationSettings(weights="none", activations="nvfp4")


def formats(**settings):
    """Weights' and inputs' format by module."""
    found = choose_formats(QuantizationSettings(**settings), MODULES)
    return {name: (chosen.weights, chosen.activations) for name, chosen in found.items()}


def test_the_last_matching_format_counts():
    found = formats(
        formats={"*.self_attn.*": "fp8", "model.layers.[01].*": "bf16", "model.layers.1.mlp.*": "nvfp4_weight_only"}
    )
    assert found["model.layers.2.self_attn.q_proj"] == ("fp8", "fp8")
    assert found["model.layers.2.mlp.down_proj"] == ("nvfp4", "nvfp4")
    assert found["model.layers.1.mlp.down_proj"] == ("nvfp4", "none")
    assert not [name for name in found if name.startswith("model.layers.0.")]
    assert "model.layers.1.self_attn.q_proj" not in found
    assert found["model.layers.11.self_attn.o_proj"] == ("fp8", "fp8")  # [01] is one character


@pytest.mark.parametrize(
    ("name", "layer", "attention", "mlp", "kv_cache"),
    [
        ("fp8", 0, "fp8", "fp8", "none"),
        ("mxfp8", 0, "mxfp8", "mxfp8", "none"),
        ("mxfp4", 0, "mxfp4", "mxfp4", "none"),
        ("nvfp4_kv_fp8", 0, "nvfp4", "nvfp4", "fp8"),
        ("nvfp4_mixed_fp8_attention", 3, "fp8", "nvfp4", "none"),
        ("nvfp4_first_layers_bf16", 1, None, None, "none"),
        ("nvfp4_first_layers_bf16", 2, "nvfp4", "nvfp4", "none"),
    ],
)
def test_shipped_mixtures(name, layer, attention, mlp, kv_cache):
    settings = load_settings([f"quantization={name}"]).quantization
    found = choose_formats(settings, MODULES)
    for module, weights in (("self_attn.k_proj", attention), ("mlp.down_proj", mlp)):
        chosen = found.get(f"model.layers.{layer}.{module}")
        assert (chosen.weights if chosen else None) == weights
    assert settings.kv_cache == kv_cache
    assert "lm_head" not in found


def test_keys_may_be_quoted_on_the_command_line():
    settings = load_settings(["""quantization.formats={"model.layers.[01].*": bf16, '*.mlp.*':fp8}"""]).quantization
    assert list(settings.formats.items()) == [("model.layers.[01].*", "bf16"), ("*.mlp.*", "fp8")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"formats": {"*.gate": "fp8"}}, "formats pattern .* matches no linear module"),
        ({"include": ["*.mlp.*"], "exclude": [], "formats": {"*.self_attn.*": "fp8"}}, "leave in BF16: include them"),
        ({"formats": {"*": "fp9"}}, "fp9 is unknown: did you mean fp8?"),
        ({"kv_cache": "int8"}, "kv_cache=int8 is unknown: choose one of none, fp8, nvfp4"),
        ({"on_misfit": "drop"}, "on_misfit=drop is unknown"),
        ({"weights": "fp8"}, "set quantization.activations=fp8"),
        ({"weights": "mxfp8", "activations": "none"}, "no engine kernel"),
        ({"weights": "none", "activations": "none", "kv_cache": "fp8"}, "kv_cache=fp8 has no effect"),
        ({"include": ["*", "lm_head"], "exclude": ["lm_head"]}, "both list 'lm_head'"),
    ],
)
def test_mistakes_are_named(settings, said):
    with pytest.raises(UserError, match=said):
        quantized(**settings)


def test_fused_modules_in_two_formats_are_refused(llama):
    with pytest.raises(UserError, match=r"q_proj in fp8 but .*k_proj in nvfp4"):
        plan_for(QuantizationSettings(formats={"*.q_proj": "fp8"}), llama)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Heads of 24: row-parallel attention sums over 96 inputs, over 48 on each of two ranks."""
    folder = tmp_path_factory.mktemp("llama")
    config = hf_config("llama")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return describe_model(folder)


def test_a_layer_that_does_not_divide_into_blocks(llama):
    mx = {"weights": "mxfp4", "activations": "mxfp4"}
    assert "model.layers.0.self_attn.o_proj" in plan_for(QuantizationSettings(**mx), llama).formats
    with pytest.raises(UserError, match=r"o_proj sums over 48 inputs on each of parallel.tensor=2 ranks, not a mult"):
        plan_for(QuantizationSettings(**mx), llama, tensor=2)
    kept = plan_for(QuantizationSettings(**mx, on_misfit="keep"), llama, tensor=2)
    names = [name for name in llama.linear_modules if name.endswith(("o_proj", "down_proj"))]
    assert list(kept.misfits) == names
    assert kept.unquantized == [*names, "lm_head"]
    with pytest.raises(UserError, match="head_dim is 24"):
        plan_for(QuantizationSettings(kv_cache="nvfp4"), llama)


def modelopt_choices(folder, name):
    """Format by module and of the KV cache, as ``mtq.quantize`` sets the quantizers."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = load_recipe(name).quantize.model_dump()
    mtq.quantize(model, {**settings, "algorithm": None})
    found = {}
    for module, quantizer in model.named_modules():
        if module.endswith("_quantizer") and quantizer.is_enabled:
            blocks = quantizer.block_sizes or {}
            found[module] = quantizer.num_bits, blocks.get(-1), blocks.get("scale_bits")
    return found


def key_of(number):
    cfg = {"nvfp4": NVFP4, "fp8": FP8, "mxfp8": MXFP8, "mxfp4": MXFP4}[number]
    blocks = cfg.get("block_sizes", {})
    return cfg["num_bits"], blocks.get(-1), blocks.get("scale_bits")


@pytest.mark.parametrize(
    "name",
    ["fp8_default-kv_fp8", "nvfp4_default-kv_fp8", "nvfp4_mlp_only-kv_fp8", "nvfp4_omlp_only-kv_fp8"],
)
def test_modelopt_recipes_mean_the_same(name, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "model")
    description = describe_model(folder)
    recipe = plan_for(translate(f"general/ptq/{name}", QuantizationSettings(), description), description)
    ours = {}
    for module, chosen in recipe.formats.items():
        ours[f"{module}.weight_quantizer"] = key_of(chosen.weights)
        if chosen.activations != "none":
            ours[f"{module}.input_quantizer"] = key_of(chosen.activations)
    for layer in range(description.num_layers if recipe.kv_cache != "none" else 0):
        for kind in ("k", "v"):
            ours[f"model.layers.{layer}.self_attn.{kind}_bmm_quantizer"] = key_of(recipe.kv_cache)
    assert ours == modelopt_choices(folder, f"general/ptq/{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("general/ptq/nvfp4_default-kv_none-gptq", "algorithm=gptq is not supported"),
        ("general/ptq/int4_blockwise_weight_only", "num_bits=4"),
        ("general/ptq/nvfp4_defalt-kv_fp8", "did you mean general/ptq/nvfp4_default-kv_fp8?"),
        ("general/speculative_decoding/eagle3", "has no quantize.quant_cfg"),
        ("no/such.yaml", "neither a file nor a recipe of ModelOpt"),
    ],
)
def test_what_a_modelopt_recipe_asks_in_vain_is_named(llama, name, said):
    with pytest.raises(UserError) as refused:
        translate(name, QuantizationSettings(), llama)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_modelopt_file_of_ones_own(llama, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
metadata: {recipe_type: ptq, description: attention in FP8}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: "*", enable: false}
    - quantizer_name: "*self_attn*weight_quantizer"
      cfg: {num_bits: [4, 3]}
    - quantizer_name: "*self_attn*input_quantizer"
      cfg: {num_bits: [4, 3]}
    - {quantizer_name: "*layers.3.*", enable: false}
"""
    )
    recipe = plan_for(translate(str(path), QuantizationSettings(), llama), llama)
    wanted = [name for name in llama.linear_modules if "self_attn" in name and ".3." not in name]
    assert list(recipe.formats) == wanted
    assert {chosen.weights for chosen in recipe.formats.values()} == {"fp8"}
    assert recipe.kv_cache == "none"
