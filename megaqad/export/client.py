"""An exported checkpoint as a client sees it: its files and what they declare.

Independent of the writer, as the whole client is: what must be in the files comes from transformers' own model of the
config, not from the project's tables, and the numbers go through ``dequantizer.py``. ``client_modelopt.py`` and
``client_compressed_tensors.py`` understand what config.json says, ``client_checks.py`` looks for what is wrong with the
files, ``client_model.py`` makes transformers' model of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaqad.export import client_compressed_tensors, client_modelopt
from megaqad.export.client_experts import linear_modules
from megaqad.export.client_files import VerificationError, read_json, tables
from megaqad.export.client_layout import CacheLayout, Declared, Layout

READERS = {"modelopt": client_modelopt.declared, "compressed-tensors": client_compressed_tensors.declared}
"""By ``quant_method``."""


@dataclass(frozen=True)
class Client:
    """The files of one export and what they say about themselves."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """File by tensor name."""
    declared: Declared

    @property
    def layouts(self) -> dict[str, Layout]:
        """Of the quantized modules, in model order."""
        return dict(self.declared.layouts)

    @property
    def cache(self) -> CacheLayout | None:
        """Of a quantized KV cache."""
        return self.declared.cache

    @property
    def has_cache_scales(self) -> bool:
        """Whether keys and values have scales, or must have; where they may be missing and are, they are 1."""
        cache = self.cache
        return cache is not None and (not cache.optional or any(name in self.files for name in cache.modules))

    @property
    def rounds_activations(self) -> bool:
        """Whether anything but weights is rounded: inputs of linears, keys and values."""
        return self.cache is not None or any(layout.round_input for layout in self.layouts.values())

    @property
    def weight_only(self) -> bool:
        return bool(self.layouts) and not any(layout.round_input for layout in self.layouts.values())

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> Tensor:
        """float32 [N, K]: what a quantized module multiplies with."""
        layout = self.layouts[module]
        endings = [ending for ending in layout.tensors if ending != layout.input_scale]
        return layout.read(*(self.tensor(f"{module}.{ending}") for ending in endings))


def open_export(folder: Path) -> Client:
    """Read the configuration and the tables of contents, and check that they agree.

    Raises:
        VerificationError: a missing or broken file, configurations that contradict each other.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    declared = Declared()
    if quantization is not None:
        method = quantization.get("quant_method")
        if method not in READERS:
            raise VerificationError(f"{folder}: quant_method={method} cannot be verified; export again")
        linears = linear_modules(skeleton(config), config["model_type"])
        declared = READERS[method](folder, quantization, linears, config["num_hidden_layers"])
    return Client(folder, config, tables(folder), declared)


def skeleton(config: dict[str, Any]) -> nn.Module:
    """transformers' model of this config, without memory for its weights."""
    with torch.device("meta"):
        return model_of(config)


def model_of(config: dict[str, Any]) -> nn.Module:
    """transformers' model of this config in FP32, its weights random; no code of the checkpoint's is run."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(plain), dtype=torch.float32)
