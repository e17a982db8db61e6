"""Small models with quantized layers, for tests that need a whole one."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megaqad.distillation.forward import forward_hidden
from megaqad.models.families import describe_model
from megaqad.models.load import load_weights
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.model import build_quantized
from megaqad.quantization.plan import plan_for
from megaqad.quantization.settings import QuantizationSettings
from tests.models.checkpoints import hf_config


def small_quantized_model(ranks, case="llama", *, dtype=torch.float32, recompute=False, **recipe):
    """Random weights, quantizers off."""
    with TemporaryDirectory() as folder:
        config = hf_config(case)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        architecture = describe_model(Path(folder))
    plan = plan_for(QuantizationSettings(**recipe), architecture)
    return build_quantized(architecture, ranks, plan, dtype=dtype, recompute=recompute, initialize=True)


def calibrated_student(ranks, folder, settings, tokens, dtype=torch.float32):
    """(model, plan) of the checkpoint in ``folder``, quantized by ``settings`` and calibrated on ``tokens``, int64
    [b, s] of NumPy."""
    architecture = describe_model(folder)
    plan = plan_for(settings, architecture, ranks.sizes.tensor)
    model = build_quantized(architecture, ranks, plan, dtype=dtype)
    load_weights(model, folder)

    def forward():
        return forward_hidden(model, list(torch.from_numpy(tokens).split(1)))

    calibrate(model, forward if plan.needs_data else None)
    return model, plan
