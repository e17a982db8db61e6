"""What a reader of ModelOpt's layout knows: each ``quant_algo``'s tensors and numbers, and both configuration files.

Independent of the writer, as the whole client is (``client.py``).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.export import dequantizer as numbers
from megaqad.export.client_files import VerificationError, read_json
from megaqad.export.client_layout import CacheLayout, Declared, Layout

_NVFP4_WEIGHT = {
    "weight": (torch.uint8, 2),
    "weight_scale": (torch.float8_e4m3fn, 16),
    "weight_scale_2": (torch.float32, 0),
}
_FP8_WEIGHT = {"weight": (torch.float8_e4m3fn, 1), "weight_scale": (torch.float32, 0)}
_INPUT = {"input_scale": (torch.float32, 0)}
LAYOUTS = {
    "NVFP4": Layout(
        {**_NVFP4_WEIGHT, **_INPUT},
        numbers.read_nvfp4,
        numbers.round_nvfp4,
        "input_scale",
        lambda scale: scale * 2688.0,
    ),
    "W4A16_NVFP4": Layout(_NVFP4_WEIGHT, numbers.read_nvfp4, None),
    "FP8": Layout(
        {**_FP8_WEIGHT, **_INPUT}, numbers.read_fp8, numbers.round_fp8, "input_scale", lambda scale: scale * 448.0
    ),
    "MXFP8": Layout(
        {"weight": (torch.float8_e4m3fn, 1), "weight_scale": (torch.uint8, 32)},
        numbers.read_mxfp8,
        numbers.round_mxfp8,
    ),
    "mxfp4": Layout(
        {"weight": (torch.uint8, 2), "weight_scale": (torch.uint8, 32)},
        numbers.read_mxfp4,
        numbers.round_mxfp4,
    ),
}
DYNAMIC_LAYOUTS = {
    "NVFP4": Layout(_NVFP4_WEIGHT, numbers.read_nvfp4, numbers.round_nvfp4_tokens),
    "FP8": Layout(_FP8_WEIGHT, numbers.read_fp8, numbers.round_fp8_tokens),
}
"""What differs under ``activation_scheme: dynamic``: inputs are rounded with each token's own scale, and none is
stored."""
GROUP_SIZES = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
"""As the configuration files say it; they say none of the others."""
WITH_CONFIG_GROUP = ("FP8", "NVFP4", "W4A16_NVFP4")
"""What config.json describes in ``config_groups``, and not by name alone."""
KV_CACHES = {"FP8": {"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4": "NVFP4"}
"""``kv_cache_quant_algo`` of hf_quant_config.json, and what config.json says for it."""


def _round_nvfp4_cache(x: Tensor, scale: Tensor) -> Tensor:
    """The file's scale leaves the range of four-bit codes to the engine."""
    return numbers.round_nvfp4(x, scale / (2688.0 / 448.0))


CACHE_ROUNDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "FP8": numbers.round_fp8,
    "NVFP4": _round_nvfp4_cache,
}


def declared(folder: Path, quantization: dict[str, Any], linears: list[str], num_layers: int) -> Declared:
    """What config.json's ``quantization`` and hf_quant_config.json say of the model's ``linears``.

    Raises:
        VerificationError: they contradict each other, or say what cannot be verified.
    """
    algorithms, kv_cache, dynamic = _check_configs(folder, quantization, linears)
    layouts = {**LAYOUTS, **DYNAMIC_LAYOUTS} if dynamic else LAYOUTS
    cache = None
    if kv_cache is not None:
        modules = {
            f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": f"model.layers.{layer}.self_attn.{kind}_proj"
            for layer in range(num_layers)
            for kind in ("k", "v")
        }
        cache = CacheLayout(CACHE_ROUNDING[kv_cache], modules, optional=True)
    return Declared({name: layouts[algorithm] for name, algorithm in algorithms.items()}, cache)


def _check_configs(
    folder: Path, declared: dict[str, Any], linears: list[str]
) -> tuple[dict[str, str], str | None, bool]:
    """What hf_quant_config.json says, after comparing it with config.json.

    Returns:
        quant_algo by module in model order, kv_cache_quant_algo, and whether inputs have scales of their own.
    """
    other = read_json(folder / "hf_quant_config.json").get("quantization", {})
    try:
        algorithm, kv_cache = other["quant_algo"], other["kv_cache_quant_algo"]
        mixed = algorithm == "MIXED_PRECISION"
        scheme = other.get("activation_scheme")
        dynamic = scheme is not None  # of another value than "dynamic" it is refused below
        facts = [declared["quant_algo"], sorted(declared["ignore"]), declared.get("kv_cache_scheme")]
        theirs = [algorithm, [] if mixed else sorted(other["exclude_modules"]), KV_CACHES.get(kv_cache)]
        facts.append(declared.get("activation_scheme"))
        theirs.append(scheme)
        described = mixed or algorithm in WITH_CONFIG_GROUP
        facts.append(declared["quantized_layers"] if mixed else declared["config_groups"] if described else None)
        if mixed:
            layers = other["quantized_layers"]
            theirs.append(layers)
        else:
            group = {key: other[key] for key in ("group_size",) if key in other}
            layers = {name: {"quant_algo": algorithm, **group} for name in linears if name not in facts[1]}
            theirs.append(
                {"group_0": _config_group(algorithm, group.get("group_size"), dynamic)} if described else None
            )
        groups = {tuple(entry["targets"]): entry for entry in declared["config_groups"].values()} if described else {}
        wanted: dict[tuple[str, ...], Any] = {}
        for entry in {json.dumps(layer, sort_keys=True): layer for layer in layers.values()}.values() if mixed else ():
            targets = tuple(sorted(name for name, layer in layers.items() if layer == entry))
            wanted[targets] = _config_group(entry["quant_algo"], entry.get("group_size"), dynamic, list(targets))
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder}: the quantization settings lack {error}; export again") from error
    if facts != theirs:
        raise VerificationError(f"{folder}: config.json says {facts}, hf_quant_config.json {theirs}; export again")
    if mixed and groups != wanted:
        raise VerificationError(
            f"{folder}: config_groups of config.json are not those of quantized_layers; export again"
        )
    for name, layer in layers.items():
        algorithm = layer["quant_algo"]
        if name not in linears or algorithm not in LAYOUTS or layer.get("group_size") != GROUP_SIZES.get(algorithm):
            raise VerificationError(f"{folder}: {name} in {layer} is no layout that can be verified; export again")
    if scheme not in (None, "dynamic"):
        raise VerificationError(f"{folder}: activation_scheme={scheme} cannot be verified; export again")
    if kv_cache not in (None, *KV_CACHES):
        raise VerificationError(f"{folder}: kv_cache_quant_algo={kv_cache} cannot be verified; export again")
    return {name: layers[name]["quant_algo"] for name in linears if name in layers}, kv_cache, dynamic


def _config_group(
    algorithm: str, group_size: int | None, dynamic: bool, targets: list[str] | None = None
) -> dict[str, Any]:
    """What config.json must say of the modules in one format."""
    bits = 4 if LAYOUTS[algorithm].tensors["weight"][1] == 2 else 8
    number = {"dynamic": False, "num_bits": bits, "type": "float"}
    if "mxfp4" in algorithm:
        group_size = 32
    if group_size is not None:
        number["group_size"] = group_size
    group = {"weights": number, "targets": targets or ["Linear"]}
    if LAYOUTS[algorithm].round_input is None:
        return group
    return {**group, "input_activations": {**number, "dynamic": dynamic and algorithm in DYNAMIC_LAYOUTS}}
