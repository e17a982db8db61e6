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
from megaqad.export.layouts import (
    DYNAMIC_LAYOUTS,
    INPUT,
    KV_CACHES,
    LAYOUTS,
    SCALES_OF_TENSORS,
    WITH_CONFIG_GROUP,
    Layout,
    config_group,
)
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear modules that engines multiply as one, with one global scale."""
CACHED_ATTENTION = "megaqad_rounded_kv_cache"
"""Name under which transformers knows the attention that rounds keys and values."""


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
        return self.kv_cache is not None and any(name in self.files for name in _cache_scales(self))

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


def open_export(folder: Path) -> Client:
    """Read the configuration and the tables of contents, and check that they agree.

    Raises:
        VerificationError: a missing or broken file, configurations that contradict each other.
    """
    config = _json(folder / "config.json")
    declared = config.get("quantization_config")
    algorithms: dict[str, str] = {}
    kv_cache, dynamic = None, False
    if declared is not None:
        linears = [name for name, module in _skeleton(config).named_modules() if isinstance(module, nn.Linear)]
        algorithms, kv_cache = _check_configs(folder, declared, linears)
        dynamic = "activation_scheme" in declared
    return Client(folder, config, _tables(folder), algorithms, kv_cache, dynamic)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path} cannot be read ({error}); export again") from error
    if not isinstance(content, dict):
        raise VerificationError(f"{path} holds no JSON object; export again")
    return content


def _check_configs(folder: Path, declared: dict[str, Any], linears: list[str]) -> tuple[dict[str, str], str | None]:
    """(quant_algo by module, kv_cache_quant_algo) after comparing config.json with hf_quant_config.json."""
    other = _json(folder / "hf_quant_config.json").get("quantization", {})
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
        if kind != "weight" or module not in client.algorithms:
            expected[name] = (torch.bfloat16, tuple(parameter.shape))
            continue
        rows, inputs = parameter.shape
        for ending, (dtype, covers) in client.layout(module).tensors.items():
            expected[f"{module}.{ending}"] = (dtype, (rows, inputs // covers) if covers else ())
    if client.has_cache_scales:
        expected |= dict.fromkeys(_cache_scales(client), (torch.float32, ()))
    return expected


def _cache_scales(client: Client) -> dict[str, str]:
    """Module whose outputs it scales, by name of each scale of the KV cache."""
    return {
        f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": f"model.layers.{layer}.self_attn.{kind}_proj"
        for layer in range(client.config["num_hidden_layers"])
        for kind in ("k", "v")
    }


def _check_values(client: Client, name: str, tensor: Tensor) -> None:
    """No NaN or Inf anywhere; scales are positive."""
    if tensor.dtype is torch.uint8:
        if name.endswith("_scale") and bool((tensor == 255).any()):
            raise VerificationError(f"{client.folder}: tensor {name} holds NaN; export again")
        return
    values = tensor.float()
    if not bool(values.isfinite().all()):
        raise VerificationError(f"{client.folder}: tensor {name} holds NaN or Inf; export again")
    if name.endswith(("_scale", "_scale_2")) and not bool((values > 0).all()):
        raise VerificationError(f"{client.folder}: tensor {name} holds a scale that is not positive; export again")


def _check_shared_scales(client: Client) -> None:
    """Engines use one global scale for fused modules, whatever the file says: it must be one."""
    for module in client.algorithms:
        parent, _, leaf = module.rpartition(".")
        for siblings in FUSED:
            if leaf != siblings[0]:
                continue
            names = [f"{parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in client.algorithms]
            for kind in SCALES_OF_TENSORS:
                if client.layout(module).tensors.get(kind, (None, 1))[1]:
                    continue
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
    """Every stored input scale is the calibrated amax over the format's range, to the last bit but two.

    Raises:
        VerificationError: names the module.
    """
    for module in client.algorithms:
        if "input_scale" in client.layout(module).tensors:
            amax = input_amax.get(module)
            _check_scale(client, f"{module}.input_scale", amax, client.layout(module).range, "input")


def check_cache_scales(client: Client, cache_amax: Mapping[str, float]) -> None:
    """The same for keys and values; without stored scales, that the student's are 1 too."""
    if client.kv_cache is None:
        return
    for name, module in _cache_scales(client).items():
        if client.has_cache_scales:
            _check_scale(client, name, cache_amax.get(module), 448.0, "output")
        elif cache_amax.get(module) != 448.0:
            raise VerificationError(
                f"{client.folder}: tensor {name} is missing, which means a scale of 1, while the student's amax is "
                f"{cache_amax.get(module)!r}; export again"
            )


def _check_scale(client: Client, name: str, amax: float | None, largest: float, what: str) -> None:
    scale = client.tensor(name).item()
    if amax is None or abs(scale * largest / amax - 1.0) > 2**-22:
        raise VerificationError(
            f"{client.folder}: tensor {name} is {scale!r}, the student's calibrated {what} amax {amax!r} asks for "
            f"{amax / largest if amax else None!r}; export again"
        )


def load_client_model(client: Client) -> nn.Module:
    """transformers' model in FP32 with the stored weights, dequantized; its activations stay as they are."""
    model = _from_config(client.config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in client.algorithms:
                parameter.copy_(client.weight(module))
            else:
                parameter.copy_(client.tensor(name))
    return model


def round_activations(client: Client, model: nn.Module) -> None:
    """From now on ``model`` rounds the inputs of its quantized linears, and its keys and values, as engines do."""
    modules = dict(model.named_modules())
    for name in client.algorithms:
        layout = client.layout(name)
        if layout.round_input is not None:
            scales = [client.tensor(f"{name}.{ending}") for ending in layout.tensors if ending in INPUT]
            modules[name].register_forward_pre_hook(_input_rounding(layout.round_input, scales))
    if client.kv_cache is not None:
        _round_cache(client, model)


def _input_rounding(
    rounding: Callable[..., Tensor], scales: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(args[0], *scales), *args[1:])

    return hook


def _round_cache(client: Client, model: nn.Module) -> None:
    """Give ``model`` an attention that rounds the keys and values it is handed, which are those of the cache."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    assert client.kv_cache is not None
    rounding = LAYOUTS[client.kv_cache].round_input
    assert rounding is not None
    divisor = (
        LAYOUTS[client.kv_cache].range / 448.0
    )  # the file's scale leaves the range of four-bit codes to the engine
    one = torch.ones(())
    scales = {
        module: (client.tensor(name) if client.has_cache_scales else one) / divisor
        for name, module in _cache_scales(client).items()
    }

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert rounding is not None
        prefix = f"model.layers.{module.layer_idx}.self_attn"
        key, value = rounding(key, scales[f"{prefix}.k_proj"]), rounding(value, scales[f"{prefix}.v_proj"])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(CACHED_ATTENTION, attention)
    AttentionMaskInterface.register(CACHED_ATTENTION, sdpa_mask)
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(CACHED_ATTENTION)
