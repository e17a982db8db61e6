"""An exported checkpoint as a client sees it: files, their declared contents, and the plain transformers model.

Independent of the writer: what must be in the files comes from transformers' own model of the config, not from the
project's tables, and the numbers go through ``dequantizer.py``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaqad.errors import UserError
from megaqad.export.dequantizer import quantize_input, read_weight
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear modules that engines multiply as one, with one global scale."""

PACKED_DTYPES = {
    "weight": torch.uint8,
    "weight_scale": torch.float8_e4m3fn,
    "weight_scale_2": torch.float32,
    "input_scale": torch.float32,
}


class VerificationError(UserError):
    """The exported files are not what they should be; the message names the first thing that is wrong."""


@dataclass(frozen=True)
class Client:
    """The files of one export and what they say about themselves."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """File by tensor name."""
    quantized: list[str]
    """Quantized module names, in model order."""
    weight_only: bool

    @property
    def rounds_inputs(self) -> bool:
        """Whether its quantized linears also quantize their input (W4A4)."""
        return bool(self.quantized) and not self.weight_only

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def packed_names(self, module: str) -> list[str]:
        """The tensors of one quantized module."""
        return [f"{module}.{kind}" for kind in PACKED_DTYPES if not (self.weight_only and kind == "input_scale")]


def open_export(folder: Path) -> Client:
    """Read the configuration and the tables of contents, and check that they agree.

    Raises:
        VerificationError: a missing or broken file, configurations that contradict each other.
    """
    config = _json(folder / "config.json")
    declared = config.get("quantization_config")
    quantized: list[str] = []
    weight_only = False
    if declared is not None:
        excluded, weight_only = _check_configs(folder, declared)
        linears = [name for name, module in _skeleton(config).named_modules() if isinstance(module, nn.Linear)]
        quantized = [name for name in linears if name not in excluded]
    return Client(folder, config, _tables(folder), quantized, weight_only)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path} cannot be read ({error}); export again") from error
    if not isinstance(content, dict):
        raise VerificationError(f"{path} holds no JSON object; export again")
    return content


def _check_configs(folder: Path, declared: dict[str, Any]) -> tuple[set[str], bool]:
    """(excluded modules, weight-only) after comparing config.json with hf_quant_config.json."""
    other = _json(folder / "hf_quant_config.json").get("quantization", {})
    try:
        group = declared["config_groups"]["group_0"]
        facts = (declared["quant_algo"], group["weights"]["group_size"], sorted(declared["ignore"]))
        theirs = (other["quant_algo"], other["group_size"], sorted(other["exclude_modules"]))
        kv = other["kv_cache_quant_algo"]
    except (KeyError, TypeError) as error:
        raise VerificationError(f"{folder}: the quantization settings lack {error}; export again") from error
    if facts != theirs:
        raise VerificationError(f"{folder}: config.json says {facts}, hf_quant_config.json {theirs}; export again")
    algorithm, group_size, excluded = facts
    weight_only = "input_activations" not in group
    if (algorithm, group_size, kv) != ("W4A16_NVFP4" if weight_only else "NVFP4", 16, None):
        raise VerificationError(
            f"{folder}: quant_algo={algorithm}, group_size={group_size}, kv_cache_quant_algo={kv} is not an NVFP4 "
            "layout that can be verified; export again"
        )
    return set(excluded), weight_only


def _tables(folder: Path) -> dict[str, Path]:
    """File by tensor name, through the index when there is one."""
    index = folder / "model.safetensors.index.json"
    named = _json(index).get("weight_map", {}) if index.is_file() else None
    files: dict[str, Path] = {}
    for file in sorted(set(named.values())) if named is not None else ["model.safetensors"]:
        path = _inside(folder, file, index)
        try:
            with safe_open(path, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), path))
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{path} cannot be read ({error}); export again") from error
    if named is not None and {name: path.name for name, path in files.items()} != named:
        raise VerificationError(f"{index} does not list what its files hold; export again")
    return files


def _inside(folder: Path, name: str, said_by: Path) -> Path:
    """A file of the export by the name that one of its JSON files gives; these are plain names, without folders."""
    if Path(name).name != name or name == "..":
        raise VerificationError(f"{said_by} names {name!r}, which is no file of {folder}; export again")
    return folder / name


def _skeleton(config: dict[str, Any]) -> nn.Module:
    """transformers' model of this config, without memory for its weights."""
    with torch.device("meta"):
        return _from_config(config)


def _from_config(config: dict[str, Any]) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(plain), dtype=torch.float32)


def check_structure(client: Client) -> None:
    """Every tensor that a reader needs is there, with its dtype and shape, and the scales make sense.

    Raises:
        VerificationError: names the first tensor that is wrong.
    """
    expected = _expected_tensors(client)
    for problem, names in (
        ("is missing", [name for name in expected if name not in client.files]),
        ("is not part of this model", [name for name in client.files if name not in expected]),
    ):
        if names:
            raise VerificationError(f"{client.folder}: tensor {names[0]} {problem} ({len(names)} in all); export again")
    for name, (dtype, shape) in expected.items():
        tensor = client.tensor(name)
        if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
            raise VerificationError(
                f"{client.folder}: tensor {name} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} "
                f"{list(shape)}; export again"
            )
        _check_values(client, name, tensor)
    _check_shared_scales(client)


def _expected_tensors(client: Client) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape by name, from transformers' parameters and the list of quantized modules."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, parameter in _skeleton(client.config).named_parameters():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in client.quantized:
            expected[name] = (torch.bfloat16, tuple(parameter.shape))
            continue
        rows, inputs = parameter.shape
        shapes = {"weight": (rows, inputs // 2), "weight_scale": (rows, inputs // 16)}
        for packed in client.packed_names(module):
            ending = packed.rpartition(".")[2]
            expected[packed] = (PACKED_DTYPES[ending], shapes.get(ending, ()))
    return expected


def _check_values(client: Client, name: str, tensor: Tensor) -> None:
    """No NaN or Inf anywhere; scales are positive."""
    if tensor.dtype is torch.uint8:
        return
    values = tensor.float()
    if not bool(values.isfinite().all()):
        raise VerificationError(f"{client.folder}: tensor {name} holds NaN or Inf; export again")
    if name.endswith(("_scale", "_scale_2")) and not bool((values > 0).all()):
        raise VerificationError(f"{client.folder}: tensor {name} holds a scale that is not positive; export again")


def _check_shared_scales(client: Client) -> None:
    """Engines use one global scale for fused modules, whatever the file says: it must be one."""
    quantized = set(client.quantized)
    kinds = ("weight_scale_2",) if client.weight_only else ("weight_scale_2", "input_scale")
    for module in client.quantized:
        parent, _, leaf = module.rpartition(".")
        for siblings in FUSED:
            if leaf != siblings[0]:
                continue
            names = [f"{parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in quantized]
            for kind in kinds:
                values = {name: client.tensor(f"{name}.{kind}").item() for name in names}
                if len(set(values.values())) > 1:
                    raise VerificationError(
                        f"{client.folder}: {kind} differs among fused modules {values}; export again"
                    )


def check_files(folder: Path) -> None:
    """Compare the small files with the checksums taken when they were written.

    Raises:
        VerificationError: names the file that changed.
    """
    for name, digest in _json(folder / MANIFEST_FILE).get("files", {}).items():
        path = _inside(folder, name, folder / MANIFEST_FILE)
        if not path.is_file() or file_digest(path) != digest:
            raise VerificationError(f"{path} is missing or changed since it was written; export again")


def check_tensors(client: Client) -> int:
    """Compare every tensor with the checksum taken before it was written; the number of tensors.

    Raises:
        VerificationError: names the tensor that changed.
    """
    recorded = _json(client.folder / MANIFEST_FILE).get("tensors", {})
    if set(recorded) != set(client.files):
        different = min(set(recorded) ^ set(client.files))
        raise VerificationError(
            f"{client.folder}: tensor {different} is in {MANIFEST_FILE} or in the files, not in both; export again"
        )
    for name, digest in recorded.items():
        if tensor_digest(client.tensor(name)) != digest:
            raise VerificationError(
                f"{client.folder}: tensor {name} changed since it was written (SHA-256 differs); export again"
            )
    return len(recorded)


def check_input_scales(client: Client, input_amax: Mapping[str, float]) -> None:
    """Every stored input scale is the calibrated amax / 2688, to the last bit but two.

    Raises:
        VerificationError: names the module.
    """
    for module in client.quantized:
        scale, amax = client.tensor(f"{module}.input_scale").item(), input_amax.get(module)
        if amax is None or abs(scale * 2688.0 / amax - 1.0) > 2**-22:
            raise VerificationError(
                f"{client.folder}: tensor {module}.input_scale is {scale!r}, the student's calibrated input amax "
                f"{amax!r} asks for {amax / 2688.0 if amax else None!r}; export again"
            )


def load_client_model(client: Client) -> nn.Module:
    """transformers' model in FP32 with the stored weights, dequantized; its activations stay as they are."""
    model = _from_config(client.config).eval()
    quantized = set(client.quantized)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in quantized:
                parts = [client.tensor(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")]
                parameter.copy_(read_weight(*parts))
            else:
                parameter.copy_(client.tensor(name))
    return model


def round_inputs(client: Client, model: nn.Module) -> None:
    """From now on the quantized linears of ``model`` round their input with the stored scale, as W4A4 engines do."""
    modules = dict(model.named_modules())
    for name in client.quantized:
        modules[name].register_forward_pre_hook(_input_rounding(client.tensor(f"{name}.input_scale")))


def _input_rounding(scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_input(args[0], scale), *args[1:])

    return hook
