"""ModelOpt's own export, made live on the CPU: the bytes that ours are compared with."""

import copy
from pathlib import Path

import torch


def modelopt_export(folder: Path, output: Path, tokens: torch.Tensor, *, weight_only: bool) -> dict[str, float]:
    """Quantize and export the checkpoint with ModelOpt; its calibrated input amax by module name."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings = copy.deepcopy(mtq.W4A16_NVFP4_CFG if weight_only else mtq.NVFP4_DEFAULT_CFG)
    model = mtq.quantize(model, settings, lambda quantized: quantized(tokens))
    amax = {
        name.removesuffix(".input_quantizer"): module.amax.float().item()
        for name, module in model.named_modules()
        if name.endswith("_proj.input_quantizer") and module.is_enabled
    }
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(output))
    return amax
