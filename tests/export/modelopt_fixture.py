"""ModelOpt's own export, made live on the CPU: the bytes that ours are compared with."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
FP8 = {"num_bits": (4, 3), "axis": None}
QUANTIZERS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "bf16": (None, None),
    "nvfp4": (NVFP4, NVFP4),
    "nvfp4_weight_only": (NVFP4, None),
    "fp8": (FP8, FP8),
    "mxfp8": (MXFP8, MXFP8),
    "mxfp4": (MXFP4, MXFP4),
}
"""Of weights and inputs."""


@dataclass(frozen=True)
class Calibrated:
    """What ModelOpt calibrated, by module name."""

    input_amax: dict[str, float]
    cache_amax: dict[str, float]


def quant_cfg(formats: dict[str, str], kv_cache: str) -> list[dict[str, Any]]:
    """ModelOpt's rules for formats by pattern, the last that matches."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern, choice in formats.items():
        for kind, cfg in zip(("weight", "input"), QUANTIZERS[choice], strict=True):
            name = f"{'' if pattern == '*' else pattern}*{kind}_quantizer"
            rule = {"quantizer_name": name}
            rules.append(rule | ({"enable": False} if cfg is None else {"cfg": copy.deepcopy(cfg), "enable": True}))
    if "lm_head" not in formats:
        rules.append({"quantizer_name": "*lm_head*", "enable": False})
    rules.append({"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False})
    if kv_cache != "none":
        cfg = copy.deepcopy({"fp8": FP8, "nvfp4": NVFP4}[kv_cache])
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cfg, "enable": True})
    return rules


def max_settings(formats: dict[str, str], kv_cache: str) -> dict[str, Any]:
    """ModelOpt's settings for formats by pattern, calibrated by the largest values."""
    return {"quant_cfg": quant_cfg(formats, kv_cache), "algorithm": "max"}


def modelopt_export(folder: Path, output: Path, tokens: torch.Tensor, settings: dict[str, Any]) -> Calibrated:
    """Quantize by ModelOpt's ``settings`` and export the checkpoint with ModelOpt."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = mtq.quantize(model, settings, lambda quantized: quantized(tokens))
    inputs, caches = {}, {}
    for name, module in model.named_modules():
        if name.endswith("_quantizer") and module.is_enabled and module.amax is not None:
            parent, _, kind = name.rpartition(".")
            if kind == "input_quantizer":
                inputs[parent] = module.amax.float().item()
            elif kind in ("k_bmm_quantizer", "v_bmm_quantizer"):
                caches[f"{parent}.{kind[0]}_proj"] = module.amax.float().item()
    _share_fp8_scales(model)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(output))
    return Calibrated(inputs, caches)


def _share_fp8_scales(model: torch.nn.Module) -> None:
    """What ModelOpt's exporter does for every format but FP8: one amax for the modules that engines fuse."""
    from modelopt.torch.export.quant_utils import get_quantization_format, preprocess_linear_fusion

    for module in model.modules():
        for siblings in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            fused = [getattr(module, name) for name in siblings if hasattr(module, name)]
            if fused and get_quantization_format(fused[0]) == "fp8":
                preprocess_linear_fusion(fused)
