"""The layout of the compressed-tensors library, which vLLM, SGLang and transformers itself read.

The same bytes as in ModelOpt's layout under other names; scales of whole tensors are float32 [1], since readers take
one of shape [] for BF16. NVFP4's are stored as what one multiplies by, 2688 / amax:

                            NVFP4                       FP8                     MXFP8               MXFP4
    weight                  -                           float8_e4m3fn [N, K]    as FP8              -
    weight_packed           uint8 [N, K / 2]            -                       -                   as NVFP4
    weight_scale            float8_e4m3fn [N, K / 16]   float32 [1]             uint8 [N, K / 32]   uint8 [N, K / 32]
    weight_global_scale     float32 [1]                 -                       -                   -
    input_global_scale      float32 [1]                 -                       -                   -
    input_scale             -                           float32 [1]             -                   -

A reader that divides by the stored 1 / scale multiplies by the scale or, for one tensor in five, by a neighbour of it
in FP32. Rounded to BF16 that shows where a value lies half way between two BF16 numbers: 0.06 % of the weights, by one
step (300 random matrices); in FP32, where engines multiply, nowhere.

An FP8 KV cache has ``self_attn.k_scale`` and ``self_attn.v_scale``, float32 [1], of 1 too where that is the scale.
config.json says all of it. Each group names its own format, and its modules one by one where "Linear" would not do:
several groups, or the output head, which vLLM does not take for a Linear. What no reader of this layout knows is
refused before any work: an NVFP4 cache, and NVFP4 inputs with scales of their own. FP8 inputs with each token's own are
read by all of them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaqad.export.layout import bf16_config, groups_of
from megaqad.models.architecture import Architecture
from megaqad.quantization.formats import LinearFormat, cache_number
from megaqad.quantization.plan import QuantizationPlan

VERSION = "0.20.0"
"""The release of the library that the files were compared with; readers are told."""

FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "fp8": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
"""The library's ``format`` by ours."""
MIXED = "mixed-precision"

_GLOBAL = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
NAMES: dict[str, dict[str, str]] = {"nvfp4": _GLOBAL, "mxfp4": {"weight": "weight_packed"}}
"""Endings that differ from ModelOpt's."""

SCHEMES: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    "fp8": {"num_bits": 8, "strategy": "tensor"},
    "mxfp8": {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}
"""The library's ``QuantizationArgs`` of a tensor, but for what all have and for ``dynamic``."""
INPUTS_ARE_DYNAMIC: dict[str, bool | str] = {"nvfp4": "local", "fp8": False, "mxfp8": True, "mxfp4": True}
"""``dynamic`` of calibrated inputs: NVFP4's block scales come from the input, its global scale is stored."""
FP8_TOKENS = {"num_bits": 8, "strategy": "token"}
"""Inputs with a scale for each token."""


def stored(number: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the library's endings; scales of whole tensors as float32 [1], NVFP4's as reciprocals."""
    names, kept = NAMES.get(number, {}), {}
    for ending, tensor in tensors.items():
        name = names.get(ending, ending)
        value = tensor.reciprocal() if name.endswith("_global_scale") else tensor
        kept[name] = value if value.dim() else value.reshape(1)
    return kept


def cache_scale_names(kv_cache: str, key: str, value: str) -> list[str]:
    """They belong to the attention, not to its projections."""
    if kv_cache == "none":
        return []
    return [f"{module.rpartition('.')[0]}.{kind}_scale" for module, kind in ((key, "k"), (value, "v"))]


def config_files(architecture: Architecture, plan: QuantizationPlan) -> dict[str, dict[str, Any]]:
    """config.json with its ``quantization_config``."""
    config, formats = bf16_config(architecture), plan.formats
    if not formats:
        return {"config.json": config}
    groups = groups_of({name: _scheme(chosen) for name, chosen in formats.items()})
    used = {scheme["format"] for scheme, _ in groups}
    by_name = len(groups) > 1 or architecture.head in formats
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": used.pop() if len(used) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {"targets": names if by_name else ["Linear"], **scheme}
            for index, (scheme, names) in enumerate(groups)
        },
        "ignore": [*plan.unquantized, *architecture.router_modules],
        "kv_cache_scheme": None if cache_number(plan.kv_cache) is None else _tensor(SCHEMES["fp8"], False),
        "version": VERSION,
    }
    return {"config.json": config}


def _scheme(chosen: LinearFormat) -> dict[str, Any]:
    """One group of config.json, without its targets."""
    inputs = None
    if chosen.dynamic:
        inputs = _tensor(FP8_TOKENS, True)
    elif chosen.activations != "none":
        inputs = _tensor(SCHEMES[chosen.activations], INPUTS_ARE_DYNAMIC[chosen.activations])
    return {
        "weights": _tensor(SCHEMES[chosen.weights], False),
        "input_activations": inputs,
        "output_activations": None,
        "format": FORMATS[chosen.weights],
    }


def _tensor(scheme: Mapping[str, Any], dynamic: bool | str) -> dict[str, Any]:
    return {**scheme, "type": "float", "symmetric": True, "dynamic": dynamic}
