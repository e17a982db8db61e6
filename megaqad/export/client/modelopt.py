"""What a reader of ModelOpt's layout knows: each ``quant_algo``'s tensors and numbers, and both configuration files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.export import dequantizer as numbers
from megaqad.export.client.files import VerificationError, read_json
from megaqad.export.client.layouts import CacheLayout, Declared, Layout, attention_modules

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
MIXED = "MIXED_PRECISION"
KV_CACHES = {None: None, "FP8": {"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4": "NVFP4"}
"""``kv_cache_quant_algo`` of hf_quant_config.json, and what config.json says for it."""


def _round_nvfp4_cache(x: Tensor, scale: Tensor) -> Tensor:
    """The file's scale leaves the range of four-bit codes to the engine."""
    return numbers.round_nvfp4(x, scale / (2688.0 / 448.0))


CACHE_ROUNDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "FP8": numbers.round_fp8,
    "NVFP4": _round_nvfp4_cache,
}


def declared(folder: Path, quantization: Mapping[str, Any], linears: Sequence[str]) -> Declared:
    """What config.json's ``quantization`` and hf_quant_config.json say of the model's ``linears``.

    Engines read config.json and fall back to the other, so both must say the same.

    Raises:
        VerificationError: they contradict each other, or say what cannot be verified.
    """
    other = read_json(folder / "hf_quant_config.json").get("quantization", {})
    try:
        _check_agreement(folder, quantization, other)
        dynamic = _is_dynamic(folder, other)
        excluded = {} if other["quant_algo"] == MIXED else dict.fromkeys(other["exclude_modules"])
        algorithms = _algorithms(folder, other, {name for name in linears if name not in excluded})
        if other["quant_algo"] in (MIXED, *WITH_CONFIG_GROUP):
            _check_groups(folder, quantization["config_groups"], algorithms, dynamic)
        kv_cache = other["kv_cache_quant_algo"]
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder}: the quantization settings lack {error}; export again") from error
    layouts = {**LAYOUTS, **DYNAMIC_LAYOUTS} if dynamic else LAYOUTS
    return Declared(
        {name: layouts[algorithms[name]] for name in linears if name in algorithms},
        None if kv_cache is None else _cache(kv_cache, linears),
        tuple(excluded),
    )


def _check_agreement(folder: Path, here: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """config.json's ``here`` against hf_quant_config.json's ``other``, fact by fact."""
    mixed, kv_cache = other["quant_algo"] == MIXED, other["kv_cache_quant_algo"]
    if kv_cache not in KV_CACHES:
        raise VerificationError(f"{folder}: kv_cache_quant_algo={kv_cache} cannot be verified; export again")
    for what, said, said_there in (
        ("quant_algo", here["quant_algo"], other["quant_algo"]),
        ("excluded modules", sorted(here["ignore"]), [] if mixed else sorted(other["exclude_modules"])),
        ("quantized_layers", here.get("quantized_layers"), other["quantized_layers"] if mixed else None),
        ("kv_cache_scheme", here.get("kv_cache_scheme"), KV_CACHES[kv_cache]),
        ("activation_scheme", here.get("activation_scheme"), other.get("activation_scheme")),
    ):
        if said != said_there:
            raise VerificationError(
                f"{folder}: config.json says {what}={said}, hf_quant_config.json {said_there}; export again"
            )


def _is_dynamic(folder: Path, said: Mapping[str, Any]) -> bool:
    """Whether inputs have scales of their own."""
    scheme = said.get("activation_scheme")
    if scheme not in (None, "dynamic"):
        raise VerificationError(f"{folder}: activation_scheme={scheme} cannot be verified; export again")
    return scheme == "dynamic"


def _algorithms(folder: Path, said: Mapping[str, Any], linears: set[str]) -> dict[str, str]:
    """``quant_algo`` by module, out of ``linears``."""
    layers = said.get("quantized_layers")
    if layers is None:
        entry = {key: said[key] for key in ("quant_algo", "group_size") if key in said}
        layers = dict.fromkeys(linears, entry)
    for name, layer in layers.items():
        algorithm = layer["quant_algo"]
        fits = algorithm in LAYOUTS and layer.get("group_size") == GROUP_SIZES.get(algorithm)
        if name not in linears or not fits:
            raise VerificationError(f"{folder}: {name} in {layer} is no layout that can be verified; export again")
    return {name: layer["quant_algo"] for name, layer in layers.items()}


def _check_groups(
    folder: Path, groups: Mapping[str, Mapping[str, Any]], algorithms: Mapping[str, str], dynamic: bool
) -> None:
    """config.json's description of the numbers, in which "Linear" stands for all that is quantized."""
    described = set[str]()
    for group in groups.values():
        said = (group["weights"], group.get("input_activations"))
        for name in algorithms if group["targets"] == ["Linear"] else group["targets"]:
            wanted = _numbers(algorithms[name], dynamic) if name in algorithms else None
            if said != wanted or name in described:
                raise VerificationError(f"{folder}: config_groups of config.json say {said} of {name}; export again")
            described.add(name)
    if described != set(algorithms):
        missing = min(set(algorithms) - described)
        raise VerificationError(f"{folder}: config_groups of config.json say nothing of {missing}; export again")


def _numbers(algorithm: str, dynamic: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``weights`` and ``input_activations`` of a group."""
    layout = LAYOUTS[algorithm]
    bits = 4 if layout.tensors["weight"][1] == 2 else 8
    number = {"dynamic": False, "num_bits": bits, "type": "float"}
    if layout.block > 1:
        number["group_size"] = layout.block
    if layout.round_input is None:
        return number, None
    return number, {**number, "dynamic": dynamic and algorithm in DYNAMIC_LAYOUTS}


def _cache(algorithm: str, linears: Iterable[str]) -> CacheLayout:
    modules = {
        f"{attention}.{kind}_proj.{kind}_scale": f"{attention}.{kind}_proj"
        for attention in attention_modules(linears)
        for kind in ("k", "v")
    }
    return CacheLayout(CACHE_ROUNDING[algorithm], modules, optional=True)
