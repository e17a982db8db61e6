"""Is everything in an export that a reader needs, unchanged, well formed, and scaled as the student is?"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaqad.export.client import Client, skeleton
from megaqad.export.client_experts import slots
from megaqad.export.client_files import VerificationError, inside, read_json
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linear modules that engines multiply as one, with one global scale."""


def check_files(folder: Path) -> None:
    """Compare the small files with the checksums taken when they were written.

    Raises:
        VerificationError: names the file that changed.
    """
    for name, digest in read_json(folder / MANIFEST_FILE).get("files", {}).items():
        path = inside(folder, name, folder / MANIFEST_FILE)
        if not path.is_file() or file_digest(path) != digest:
            raise VerificationError(f"{path} is missing or changed since it was written; export again")


def check_tensors(client: Client) -> int:
    """Compare every tensor with the checksum taken before it was written; the number of tensors.

    Raises:
        VerificationError: names the tensor that changed.
    """
    recorded = read_json(client.folder / MANIFEST_FILE).get("tensors", {})
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
    for name, parameter in slots(skeleton(client.config), client.config["model_type"]).items():
        module, _, kind = name.rpartition(".")
        layout = client.layouts.get(module)
        if kind != "weight" or layout is None:
            expected[name] = (torch.bfloat16, tuple(parameter.shape))
            continue
        rows, inputs = parameter.shape
        for ending, (dtype, covers) in layout.tensors.items():
            expected[f"{module}.{ending}"] = (dtype, (rows, inputs // covers) if covers else layout.scalar)
    if client.cache is not None and client.has_cache_scales:
        expected |= dict.fromkeys(client.cache.modules, (torch.float32, client.cache.scalar))
    return expected


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
    layouts = client.layouts
    for module, layout in layouts.items():
        parent, _, leaf = module.rpartition(".")
        for siblings in FUSED:
            if leaf != siblings[0]:
                continue
            names = [f"{parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in layouts]
            for kind in [ending for ending, (_, covers) in layout.tensors.items() if covers == 0]:
                values = {name: client.tensor(f"{name}.{kind}").item() for name in names}
                if len(set(values.values())) > 1:
                    raise VerificationError(
                        f"{client.folder}: {kind} differs among fused modules {values}; export again"
                    )


def check_input_scales(client: Client, input_amax: Mapping[str, float]) -> None:
    """Every stored input scale is the calibrated amax over the format's range, to the last bit but two.

    Raises:
        VerificationError: names the module.
    """
    for module, layout in client.layouts.items():
        if layout.input_scale is not None:
            name = f"{module}.{layout.input_scale}"
            _check_scale(client, name, layout.amax, input_amax.get(module), "input")


def check_cache_scales(client: Client, cache_amax: Mapping[str, float]) -> None:
    """The same for keys and values; without stored scales, that the student's are 1 too."""
    if client.cache is None:
        return
    for name, module in client.cache.modules.items():
        if client.has_cache_scales:
            _check_scale(client, name, lambda scale: scale * 448.0, cache_amax.get(module), "output")
        elif cache_amax.get(module) != 448.0:
            raise VerificationError(
                f"{client.folder}: tensor {name} is missing, which means a scale of 1, while the student's amax is "
                f"{cache_amax.get(module)!r}; export again"
            )


def _check_scale(client: Client, name: str, amax_of: Callable[[float], float], amax: float | None, what: str) -> None:
    scale = client.tensor(name).item()
    if amax is None or abs(amax_of(scale) / amax - 1.0) > 2**-22:
        raise VerificationError(
            f"{client.folder}: tensor {name} is {scale!r}, which stands for an amax of {amax_of(scale)!r}; the "
            f"student's calibrated {what} amax is {amax!r}; export again"
        )
