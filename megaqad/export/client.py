"""An exported checkpoint as a client sees it: its files and what they declare.

Independent of the writer, as the whole client is: what must be in the files comes from transformers' own model of the
config, not from the project's tables, and the numbers go through ``dequantizer.py``. ``client_checks.py`` looks for
what is wrong with the files, ``client_model.py`` makes transformers' model of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaqad.errors import UserError
from megaqad.export.layouts import (
    DYNAMIC_LAYOUTS,
    INPUT,
    KV_CACHES,
    LAYOUTS,
    WITH_CONFIG_GROUP,
    Layout,
    config_group,
)


class VerificationError(UserError):
    """The exported files are not what they should be; the message names the first thing that is wrong."""


@dataclass(frozen=True)
class Client:
    """The files of one export and what they say about themselves."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """File by tensor name."""
    algorithms: dict[str, str]
    """``quant_algo`` of the quantized modules, in model order."""
    kv_cache: str | None
    """``kv_cache_quant_algo``."""
    dynamic: bool = False
    """Whether inputs are rounded with scales of their own: ``activation_scheme``."""

    def layout(self, module: str) -> Layout:
        algorithm = self.algorithms[module]
        return DYNAMIC_LAYOUTS.get(algorithm, LAYOUTS[algorithm]) if self.dynamic else LAYOUTS[algorithm]

    @property
    def has_cache_scales(self) -> bool:
        """Whether keys and values have scales; a quantized cache that has none is under a scale of 1."""
        return self.kv_cache is not None and any(name in self.files for name in cache_scales(self))

    @property
    def rounds_activations(self) -> bool:
        """Whether anything but weights is rounded: inputs of linears, keys and values."""
        return self.kv_cache is not None or any(self.layout(name).round_input for name in self.algorithms)

    @property
    def weight_only(self) -> bool:
        return bool(self.algorithms) and not any(self.layout(name).round_input for name in self.algorithms)

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> Tensor:
        """float32 [N, K]: what a quantized module multiplies with."""
        layout = self.layout(module)
        return layout.read(*(self.tensor(f"{module}.{ending}") for ending in layout.tensors if ending not in INPUT))


def cache_scales(client: Client) -> dict[str, str]:
    """Module whose outputs it scales, by name of each scale of the KV cache."""
    return {
        f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": f"model.layers.{layer}.self_attn.{kind}_proj"
        for layer in range(client.config["num_hidden_layers"])
        for kind in ("k", "v")
    }


def open_export(folder: Path) -> Client:
    """Read the configuration and the tables of contents, and check that they agree.

    Raises:
        VerificationError: a missing or broken file, configurations that contradict each other.
    """
    config = read_json(folder / "config.json")
    declared = config.get("quantization_config")
    algorithms: dict[str, str] = {}
    kv_cache, dynamic = None, False
    if declared is not None:
        linears = [name for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear)]
        algorithms, kv_cache = _check_configs(folder, declared, linears)
        dynamic = "activation_scheme" in declared
    return Client(folder, config, _tables(folder), algorithms, kv_cache, dynamic)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the export.

    Raises:
        VerificationError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path} cannot be read ({error}); export again") from error
    if not isinstance(content, dict):
        raise VerificationError(f"{path} holds no JSON object; export again")
    return content


def _check_configs(folder: Path, declared: dict[str, Any], linears: list[str]) -> tuple[dict[str, str], str | None]:
    """(quant_algo by module, kv_cache_quant_algo) after comparing config.json with hf_quant_config.json."""
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
            theirs.append({"group_0": config_group(algorithm, group.get("group_size"), dynamic)} if described else None)
        groups = {tuple(entry["targets"]): entry for entry in declared["config_groups"].values()} if described else {}
        wanted: dict[tuple[str, ...], Any] = {}
        for entry in {json.dumps(layer, sort_keys=True): layer for layer in layers.values()}.values() if mixed else ():
            targets = tuple(sorted(name for name, layer in layers.items() if layer == entry))
            wanted[targets] = config_group(entry["quant_algo"], entry.get("group_size"), dynamic, list(targets))
    except (KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{folder}: the quantization settings lack {error}; export again") from error
    if facts != theirs:
        raise VerificationError(f"{folder}: config.json says {facts}, hf_quant_config.json {theirs}; export again")
    if mixed and groups != wanted:
        raise VerificationError(
            f"{folder}: config_groups of config.json are not those of quantized_layers; export again"
        )
    for name, layer in layers.items():
        known = LAYOUTS.get(layer["quant_algo"])
        if name not in linears or known is None or layer.get("group_size") != known.group_size:
            raise VerificationError(f"{folder}: {name} in {layer} is no layout that can be verified; export again")
    if scheme not in (None, "dynamic"):
        raise VerificationError(f"{folder}: activation_scheme={scheme} cannot be verified; export again")
    if kv_cache not in (None, *KV_CACHES):
        raise VerificationError(f"{folder}: kv_cache_quant_algo={kv_cache} cannot be verified; export again")
    return {name: layers[name]["quant_algo"] for name in linears if name in layers}, kv_cache


def _tables(folder: Path) -> dict[str, Path]:
    """File by tensor name, through the index when there is one."""
    index = folder / "model.safetensors.index.json"
    named = read_json(index).get("weight_map", {}) if index.is_file() else None
    files: dict[str, Path] = {}
    for file in sorted(set(named.values())) if named is not None else ["model.safetensors"]:
        path = inside(folder, file, index)
        try:
            with safe_open(path, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), path))
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{path} cannot be read ({error}); export again") from error
    if named is not None and {name: path.name for name, path in files.items()} != named:
        raise VerificationError(f"{index} does not list what its files hold; export again")
    return files


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """A file of the export by the name that one of its JSON files gives; these are plain names, without folders.

    Raises:
        VerificationError: it is none.
    """
    if Path(name).name != name or name == "..":
        raise VerificationError(f"{said_by} names {name!r}, which is no file of {folder}; export again")
    return folder / name


def skeleton(config: dict[str, Any]) -> nn.Module:
    """transformers' model of this config, without memory for its weights."""
    with torch.device("meta"):
        return model_of(config)


def model_of(config: dict[str, Any]) -> nn.Module:
    """transformers' model of this config in FP32, its weights random; no code of the checkpoint's is run."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(plain), dtype=torch.float32)
