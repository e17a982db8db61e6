"""How each ``quant_algo`` lies in an export, as a reader must take it: tensors, numbers, and what config.json says.

Independent of the writer, as the whole client is (``client.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaqad.export import dequantizer as numbers


@dataclass(frozen=True)
class Layout:
    """How one ``quant_algo`` stores a linear module of shape [N, K]."""

    tensors: dict[str, tuple[torch.dtype, int]]
    """dtype by ending, and how many of K one element covers; 0 for a scalar."""
    read: Callable[..., Tensor]
    """float32 [N, K] from the tensors, those of inputs left out."""
    round_input: Callable[..., Tensor] | None
    """An input as the engine multiplies it, from the input and, where there is one, the stored scale; None where inputs
    stay as they are."""
    group_size: int | None
    """As the configuration files say it."""
    range: float = 0.0
    """The calibrated amax over the stored input scale."""


_NVFP4_WEIGHT = {
    "weight": (torch.uint8, 2),
    "weight_scale": (torch.float8_e4m3fn, 16),
    "weight_scale_2": (torch.float32, 0),
}
INPUT = {"input_scale": (torch.float32, 0)}
SCALES_OF_TENSORS = ("weight_scale_2", "input_scale", "weight_scale")
LAYOUTS = {
    "NVFP4": Layout({**_NVFP4_WEIGHT, **INPUT}, numbers.read_nvfp4, numbers.round_nvfp4, 16, 2688.0),
    "W4A16_NVFP4": Layout(_NVFP4_WEIGHT, numbers.read_nvfp4, None, 16),
    "FP8": Layout(
        {"weight": (torch.float8_e4m3fn, 1), "weight_scale": (torch.float32, 0), **INPUT},
        numbers.read_fp8,
        numbers.round_fp8,
        None,
        448.0,
    ),
    "MXFP8": Layout(
        {"weight": (torch.float8_e4m3fn, 1), "weight_scale": (torch.uint8, 32)},
        numbers.read_mxfp8,
        numbers.round_mxfp8,
        32,
    ),
    "mxfp4": Layout(
        {"weight": (torch.uint8, 2), "weight_scale": (torch.uint8, 32)},
        numbers.read_mxfp4,
        numbers.round_mxfp4,
        None,
    ),
}
DYNAMIC_LAYOUTS = {
    "NVFP4": replace(LAYOUTS["NVFP4"], tensors=_NVFP4_WEIGHT, round_input=numbers.round_nvfp4_tokens),
    "FP8": replace(
        LAYOUTS["FP8"],
        tensors={ending: kind for ending, kind in LAYOUTS["FP8"].tensors.items() if ending not in INPUT},
        round_input=numbers.round_fp8_tokens,
    ),
}
"""What differs under ``activation_scheme: dynamic``: inputs are rounded with each token's own scale, and none is
stored."""
WITH_CONFIG_GROUP = ("FP8", "NVFP4", "W4A16_NVFP4")
"""What config.json describes in ``config_groups``, and not by name alone."""
KV_CACHES = {"FP8": {"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4": "NVFP4"}
"""``kv_cache_quant_algo`` of hf_quant_config.json, and what config.json says for it."""


def config_group(
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
