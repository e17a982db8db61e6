"""Every PTQ recipe that ModelOpt ships means the same here, to the byte, or is refused in one line."""

import json

import pytest
import torch
from modelopt.recipe import load_recipe
from safetensors.torch import load_file

from megaqad.errors import UserError
from megaqad.models.families import describe_model
from megaqad.quantization.modelopt_recipe import _shipped, translate
from megaqad.quantization.plan import own_format, plan_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.runtime.ranks import ParallelSizes
from tests.export.export_runs import export_weights
from tests.export.modelopt_fixture import modelopt_export
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens
from tests.ranks import run_ranks

CASE = "mistral"
SHIPPED = [name for name in _shipped() if "/ptq/" in name]
ACCEPTED = [
    "general/ptq/fp8_default-kv_fp8",
    "general/ptq/fp8_default-kv_fp8_cast",
    "general/ptq/nvfp4_default-kv_fp8",
    "general/ptq/nvfp4_default-kv_fp8_cast",
    "general/ptq/nvfp4_default-kv_nvfp4_cast",
    "general/ptq/nvfp4_mlp_only-kv_fp8",
    "general/ptq/nvfp4_mlp_only-kv_fp8_cast",
    "general/ptq/nvfp4_mlp_only-novit-kv_fp8",
    "general/ptq/nvfp4_omlp_only-kv_fp8",
    "general/ptq/nvfp4_omlp_only-kv_fp8_cast",
    "general/ptq/nvfp4_weight_only-kv_fp16",
    "general/ptq/nvfp4_weight_only-kv_fp8_cast",
    "huggingface/nemotron_vl/ptq/nvfp4-kv_fp8_cast",
    "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast",
    "huggingface/qwen3_5_moe/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast",
    "huggingface/step3p7/ptq/nvfp4_mlp_only-kv_fp8",
    "models/mistralai/Mistral-Medium-3.5-128B/ptq/nvfp4-max-calib",
    "models/stepfun-ai/Step-3.5-Flash/ptq/nvfp4-mlp-only",
]
"""For a dense Llama-like model. The others are for experts only, or have methods and formats that are not done here."""
REASONS = {
    "general/ptq/mxfp4_mlp_weight_only": "no reader could tell whether to round inputs",
    "general/ptq/nvfp4_experts_only-kv_fp8": "quantizes no linear module of this model",
    "general/ptq/nvfp4_mlp_weight_only": "block_sizes={-1: 32}, which is not supported",
    "general/ptq/nvfp4_mlp_only_mse-kv_fp8_cast": "take its max counterpart with quantization.calibration=mse",
}
"""Why some of these are refused; the others are refused in one line as well."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(CASE, tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def translated(name, folder):
    description = describe_model(folder)
    return plan_for(translate(name, QuantizationSettings(), description), description)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ACCEPTED])
def test_what_means_something_else_is_refused_in_one_line(name, model):
    with pytest.raises(UserError) as refused:
        translated(name, model)
    assert "\n" not in str(refused.value)
    assert REASONS.get(name, "") in str(refused.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_bytes_are_modelopts(name, model, tmp_path):
    recipe = translated(name, model)
    tokens = torch.from_numpy(random_tokens(CASES[CASE]["vocab_size"]))
    settings = load_recipe(name).quantize.model_dump()
    theirs = modelopt_export(model, tmp_path / "theirs", tokens, settings)
    options = {
        "output_dir": tmp_path / "ours",
        "formats": {name: own_format(one.weights, one.activations) for name, one in recipe.formats.items()},
        "kv_cache": recipe.kv_cache,
        **vars(theirs),
    }
    run_ranks(1, export_weights, model, ParallelSizes(), options)
    expected, written = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert set(written) == set(expected)
    for key, tensor in expected.items():
        assert written[key].dtype is tensor.dtype, key
        assert torch.equal(written[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key
    for file, part, excluded in (
        ("hf_quant_config.json", "quantization", "exclude_modules"),
        ("config.json", "quantization_config", "ignore"),
    ):
        contents = [json.loads((tmp_path / side / file).read_text()) for side in ("theirs", "ours")]
        for content in contents:  # ModelOpt shortens names to patterns, which engines read as more than it means
            content[part].pop(excluded, None)
        assert contents[0] == contents[1], file
