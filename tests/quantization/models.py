"""Small models with quantized layers, for tests that need a whole one."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megaqad.distillation.forward import forward_hidden
from megaqad.models.build import build_model, transformer_config
from megaqad.models.description import describe_model
from megaqad.models.hf_reader import load_weights
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.recipe import recipe_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.state import modules_for
from tests.models.checkpoints import hf_config


def small_quantized_model(context, case="llama", *, dtype=torch.float32, recompute=False, **recipe):
    """Chunks with random weights, quantizers off."""
    with TemporaryDirectory() as folder:
        config = hf_config(case)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        description = describe_model(Path(folder))
    made = recipe_for(QuantizationSettings(**recipe), description)
    settings = transformer_config(description, context.sizes, dtype=dtype, recompute=recompute, initialize=True)
    return build_model(description, settings, context, **modules_for(made, description))


def calibrated_student(context, folder, settings, tokens, dtype=torch.float32):
    """(chunks, description, recipe) of the checkpoint in ``folder``, quantized by ``settings`` and calibrated on
    ``tokens``, int64 [b, s] of NumPy."""
    description = describe_model(folder)
    recipe = recipe_for(settings, description, context.sizes.tensor)
    config = transformer_config(description, context.sizes, dtype=dtype)
    chunks = build_model(description, config, context, **modules_for(recipe, description))
    load_weights(chunks, description, folder)

    def forward():
        return forward_hidden(chunks, list(torch.from_numpy(tokens).split(1)))

    calibrate(chunks, context, forward if recipe.needs_data else None)
    return chunks, description, recipe
