"""ModelOpt's unified Hugging Face layout, which vLLM, TensorRT-LLM and SGLang read: names and configuration files.

A quantized linear of shape [N, K] becomes several tensors; everything else keeps its name, in BF16:

                    NVFP4                       FP8                     MXFP8               MXFP4
    weight          uint8 [N, K / 2]            float8_e4m3fn [N, K]    as FP8              as NVFP4
    weight_scale    float8_e4m3fn [N, K / 16]   float32 []              uint8 [N, K / 32]   uint8 [N, K / 32]
    weight_scale_2  float32 []                  -                       -                   -
    input_scale     float32 []                  float32 []              -                   -

Four-bit codes lie two to a byte, the even element in the low nibble; block scales row-major. Per-tensor scales are
amax / 2688 (NVFP4) or amax / 448 (FP8), the same for q, k, v and for gate, up; weight-only NVFP4 has no input scale. A
quantized KV cache adds ``k_proj.k_scale`` and ``v_proj.v_scale``, float32 []: amax / 448 for NVFP4 as well, where
engines put the range of four-bit codes in themselves. Caches under a scale of 1 have none: engines take 1 then.

With dynamic input scales (``quantization.activation_scales``) there is no ``input_scale``, and both configuration files
say ``activation_scheme: dynamic`` beside ModelOpt's keys, the contract that vLLM's pull request 49715 proposes;
``config_groups`` say it in their own words. TensorRT-LLM reads such files: where the scale is missing it takes one
from the tensor of each call. vLLM 0.33 and SGLang make room for the scale and use what is there when none comes (memory
as it was, or 1.0), so they need calibrated ones.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megaqad.export.layout import bf16_config, groups_of
from megaqad.models.architecture import Architecture
from megaqad.quantization.formats import LinearFormat, cache_number, calibrates_cache
from megaqad.quantization.plan import QuantizationPlan

KV_SCHEMES: dict[str, Any] = {"fp8": {"dynamic": False, "num_bits": 8, "type": "float"}, "nvfp4": "NVFP4"}
"""ModelOpt's ``kv_cache_scheme``."""
WITH_GROUP_SIZE = ("nvfp4", "mxfp8")
"""Formats whose ``quantized_layers`` entry holds a group size."""
WITH_CONFIG_GROUP = ("FP8", "NVFP4", "W4A16_NVFP4")
"""What ModelOpt describes in config.json when it is the only ``quant_algo``; of others it gives the name."""
DYNAMIC = "dynamic"
"""``activation_scheme`` of an export without input scales; with them nothing is said, as ModelOpt does."""
LAYOUT = {"name": "modelopt", "version": "0.47.0"}
"""The producer that readers are told. Engines recognise the layout by this name, so it names the layout's owner and
the release it was compared with; who wrote the files is said in the manifest."""


def stored(number: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are: the names inside megaqad are ModelOpt's."""
    return dict(tensors)


def cache_scale_names(kv_cache: str, key: str, value: str) -> list[str]:
    """Of the scales of the keys that module ``key`` makes and of the values of ``value``."""
    return [f"{key}.k_scale", f"{value}.v_scale"] if calibrates_cache(kv_cache) else []


def config_files(architecture: Architecture, plan: QuantizationPlan) -> dict[str, dict[str, Any]]:
    """config.json with its ``quantization_config``, and hf_quant_config.json; the same facts in both.

    One format for all quantized modules is said once, with the list of what is excluded; several are said module by
    module (``MIXED_PRECISION``). ``exclude_modules`` holds full module names: engines also match substrings, under
    which ``layers.1`` would mean ``layers.10`` too.
    """
    config, formats = bf16_config(architecture), plan.formats
    if not formats:
        return {"config.json": config}
    scheme = {"activation_scheme": DYNAMIC} if any(chosen.dynamic for chosen in formats.values()) else {}
    excluded = [*plan.unquantized, *architecture.router_modules]
    layers = {name: _algorithm(chosen) for name, chosen in formats.items()}
    groups = groups_of(layers)
    details: dict[str, Any]
    if len(groups) == 1:
        details = {**groups[0][0], "exclude_modules": [*excluded, architecture.embedding]}
        targets = [["Linear"]]
    else:
        details = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        targets = [sorted(names) for _, names in groups]
    numbers = [_numbers(formats[names[0]]) for _, names in groups]
    described = "quantized_layers" in details or details["quant_algo"] in WITH_CONFIG_GROUP
    config_groups = {
        f"group_{index}": {**number, "targets": target}
        for index, (number, target) in enumerate(zip(numbers, targets, strict=True))
    }
    config["quantization_config"] = {
        **({"config_groups": config_groups} if described else {}),
        "ignore": details.get("exclude_modules", []),
        "quant_algo": details["quant_algo"],
        "producer": LAYOUT,
        "quant_method": "modelopt",
        **scheme,
    }
    if "quantized_layers" in details:
        config["quantization_config"]["quantized_layers"] = layers
    number = cache_number(plan.kv_cache)
    if number is not None:
        config["quantization_config"]["kv_cache_scheme"] = KV_SCHEMES[number]
    kv_algorithm = None if number is None else number.upper()
    details = {"kv_cache_quant_algo": kv_algorithm, **details, **scheme}
    return {"config.json": config, "hf_quant_config.json": {"producer": LAYOUT, "quantization": details}}


def _algorithm(chosen: LinearFormat) -> dict[str, Any]:
    """One module's entry in ``quantized_layers``."""
    grouped = {"group_size": chosen.facts.block} if chosen.weights in WITH_GROUP_SIZE else {}
    return {"quant_algo": chosen.algorithm, **grouped}


def _numbers(chosen: LinearFormat) -> dict[str, Any]:
    """One ``config_groups`` entry without its targets."""
    number = {"dynamic": False, "num_bits": int(chosen.facts.bits), "type": "float"}
    if chosen.facts.block > 1:
        number["group_size"] = chosen.facts.block
    if chosen.activations == "none":
        return {"weights": number}
    return {"weights": number, "input_activations": {**number, "dynamic": chosen.dynamic}}
