"""What a layout of quantized checkpoints decides, and what all of them share."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from megaqad.models.architecture import Architecture
from megaqad.quantization.numbers import EXPORT_DTYPE
from megaqad.quantization.plan import QuantizationPlan


class CheckpointLayout(Protocol):
    """What a module must define to serve as a layout: how tensors are called and kept, what the configuration says."""

    def stored(self, number: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a module in the format ``number`` by the endings that the layout gives them.

        Args:
            tensors: some of what ``NumberFormat.quantize_weight`` names, ``input_scale``, ``k_scale``, ``v_scale``;
                scales of whole tensors are float32 [], what one divides by.
        """
        ...

    def cache_scale_names(self, kv_cache: str, key: str, value: str) -> list[str]:
        """Of the scales of the keys that module ``key`` makes and the values of module ``value``, in this order; none
        where readers take a scale of 1. ``kv_cache``: a member of ``formats.KV_CACHE``."""
        ...

    def config_files(self, architecture: Architecture, plan: QuantizationPlan) -> dict[str, dict[str, Any]]:
        """Content of the JSON files by name."""
        ...


def bf16_config(architecture: Architecture) -> dict[str, Any]:
    """The original config.json, for weights in BF16."""
    config = {**architecture.config, "dtype": str(EXPORT_DTYPE).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)  # of a source that was itself quantized
    return config


def groups_of(descriptions: Mapping[str, Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    """Names with equal descriptions (JSON objects) together: (description, names) in order of appearance."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, described in descriptions.items():
        known = next((names for other, names in groups if other == described), None)
        if known is None:
            groups.append((dict(described), [name]))
        else:
            known.append(name)
    return groups
