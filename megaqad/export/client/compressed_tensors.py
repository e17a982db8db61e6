"""What a reader of compressed-tensors' layout knows: each format's tensors and numbers, and what config.json says."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.export import dequantizer as numbers
from megaqad.export.client.files import VerificationError
from megaqad.export.client.layouts import CacheLayout, Declared, Layout, attention_modules


def _read_nvfp4(packed: Tensor, block_scales: Tensor, inverse: Tensor) -> Tensor:
    one = torch.ones(())
    return numbers.read_nvfp4(packed, block_scales.float() / inverse, one)  # divided, as the library does


def _round_nvfp4(x: Tensor, inverse: Tensor) -> Tensor:
    return numbers.round_nvfp4(x, 1.0 / inverse)


ONE = (1,)
_E2M1, _E4M3, _E8M0, _FP32 = (torch.uint8, 2), (torch.float8_e4m3fn, 1), (torch.uint8, 32), (torch.float32, 0)
_NVFP4 = {"weight_packed": _E2M1, "weight_scale": (torch.float8_e4m3fn, 16), "weight_global_scale": _FP32}
_FP8 = {"weight": _E4M3, "weight_scale": _FP32}
_ARGS = {"type": "float", "symmetric": True, "dynamic": False}
_NVFP4_ARGS = {
    **_ARGS,
    "num_bits": 4,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
_FP8_ARGS = {**_ARGS, "num_bits": 8, "strategy": "tensor"}
_MXFP8_ARGS = {**_ARGS, "num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_MXFP4_ARGS = {**_MXFP8_ARGS, "num_bits": 4}


@dataclass(frozen=True)
class Scheme:
    """One kind of ``config_groups`` entry."""

    format: str
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None
    layout: Layout


SCHEMES = (
    Scheme(
        "nvfp4-pack-quantized",
        _NVFP4_ARGS,
        {**_NVFP4_ARGS, "dynamic": "local"},
        Layout(
            {**_NVFP4, "input_global_scale": _FP32},
            _read_nvfp4,
            _round_nvfp4,
            "input_global_scale",
            lambda inverse: 2688.0 / inverse,
            ONE,
        ),
    ),
    Scheme("nvfp4-pack-quantized", _NVFP4_ARGS, None, Layout(_NVFP4, _read_nvfp4, None, scalar=ONE)),
    Scheme(
        "float-quantized",
        _FP8_ARGS,
        _FP8_ARGS,
        Layout(
            {**_FP8, "input_scale": _FP32},
            numbers.read_fp8,
            numbers.round_fp8,
            "input_scale",
            lambda scale: scale * 448.0,
            ONE,
        ),
    ),
    Scheme(
        "float-quantized",
        _FP8_ARGS,
        {**_FP8_ARGS, "strategy": "token", "dynamic": True},
        Layout(_FP8, numbers.read_fp8, numbers.round_fp8_tokens, scalar=ONE),
    ),
    Scheme(
        "mxfp8-quantized",
        _MXFP8_ARGS,
        {**_MXFP8_ARGS, "dynamic": True},
        Layout({"weight": _E4M3, "weight_scale": _E8M0}, numbers.read_mxfp8, numbers.round_mxfp8),
    ),
    Scheme(
        "mxfp4-pack-quantized",
        _MXFP4_ARGS,
        {**_MXFP4_ARGS, "dynamic": True},
        Layout({"weight_packed": _E2M1, "weight_scale": _E8M0}, numbers.read_mxfp4, numbers.round_mxfp4),
    ),
)


def declared(folder: Path, quantization: Mapping[str, Any], linears: Sequence[str]) -> Declared:
    """What config.json's ``quantization`` says of the model's ``linears``.

    Raises:
        VerificationError: it says nothing of a module, or two things, or what cannot be verified.
    """
    try:
        found: dict[str, Scheme] = {}
        known, ignored, status = set(linears), set(quantization["ignore"]), quantization["quantization_status"]
        for group in quantization["config_groups"].values():
            scheme = _scheme(folder, group)
            # A class of modules means all that the groups do not name and ``ignore`` does not list.
            targets = [name for name in linears if name not in ignored] if group["targets"] == ["Linear"] else None
            for name in group["targets"] if targets is None else targets:
                if name in found or name not in known or name in ignored:
                    raise VerificationError(
                        f"{folder}: config.json says two things of {name}, or it is no linear module; export again"
                    )
                found[name] = scheme
        kv_cache, overall = quantization["kv_cache_scheme"], quantization["format"]
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder}: the quantization settings lack {error}; export again") from error
    formats = {scheme.format for scheme in found.values()}
    wanted = formats.pop() if len(formats) == 1 else "mixed-precision"
    if (overall, status) != (wanted, "compressed"):
        raise VerificationError(
            f"{folder}: config.json says format={overall}, quantization_status={status} where its groups are {wanted} "
            "and compressed; export again"
        )
    unsaid = [name for name in linears if name not in found and name not in ignored]
    if unsaid:
        raise VerificationError(f"{folder}: config.json neither quantizes nor ignores {unsaid[0]}; export again")
    layouts = {name: found[name].layout for name in linears if name in found}
    return Declared(layouts, _cache(folder, kv_cache, linears))


def _scheme(folder: Path, group: Mapping[str, Any]) -> Scheme:
    for scheme in SCHEMES:
        said = (group["format"], group["weights"], group["input_activations"], group["output_activations"])
        if said == (scheme.format, scheme.weights, scheme.input_activations, None):
            return scheme
    raise VerificationError(f"{folder}: {group} of config.json cannot be verified; export again")


def _cache(folder: Path, said: Mapping[str, Any] | None, linears: Iterable[str]) -> CacheLayout | None:
    if said is None:
        return None
    if said != _FP8_ARGS:
        raise VerificationError(f"{folder}: kv_cache_scheme={said} cannot be verified; export again")
    modules = {
        f"{attention}.{kind}_scale": f"{attention}.{kind}_proj"
        for attention in attention_modules(linears)
        for kind in ("k", "v")
    }
    return CacheLayout(numbers.round_fp8, modules, optional=False, scalar=ONE)
