"""A small random model with NVFP4 layers, for tests that need a whole one."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megaqad.models.build import build_model, transformer_config
from megaqad.models.description import describe_model
from megaqad.quantization.recipe import recipe_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.state import modules_for
from tests.models.checkpoints import hf_config


def small_quantized_model(context, case="llama", **recipe):
    """Chunks with random weights, quantizers off."""
    with TemporaryDirectory() as folder:
        config = hf_config(case)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        description = describe_model(Path(folder))
    made = recipe_for(QuantizationSettings(**recipe), description)
    settings = transformer_config(description, context.sizes, dtype=torch.float32, initialize=True)
    return build_model(description, settings, context, **modules_for(made, description))
