"""An export, opened: its files, what they declare, and every tensor looked at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.export.client import compressed_tensors, modelopt
from megaqad.export.client.files import TensorReader, VerificationError, inside, read_json, tables
from megaqad.export.client.layouts import CacheLayout, Declared, Layout
from megaqad.export.client.parameters import Parameter, Source, parameters_of, skeleton_of
from megaqad.export.manifest import MANIFEST_FILE, file_digest, tensor_digest

READERS = {"modelopt": modelopt.declared, "compressed-tensors": compressed_tensors.declared}
"""By ``quant_method``."""
Advance = Callable[[str, int, int], None]
"""Told of progress: what is being read, steps done, steps in all."""


@dataclass(frozen=True)
class Client:
    """The files of one export and what they say about themselves."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """File by tensor name."""
    parameters: Mapping[str, Parameter]
    """Of transformers' model, by name."""
    declared: Declared
    _reader: TensorReader = field(default_factory=TensorReader, repr=False)

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Of the quantized modules, in model order."""
        return self.declared.layouts

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

    @cached_property
    def linears(self) -> dict[str, Source]:
        """The weights that inputs are multiplied with, by module."""
        return _linears(self.parameters)

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return sum(torch.Size(parameter.shape).numel() for parameter in self.parameters.values())

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._reader.read(self.files[name], name)

    def weight(self, module: str) -> Tensor:
        """float32 [N, K]: what a quantized module multiplies with."""
        layout = self.layouts[module]
        endings = [ending for ending in layout.tensors if ending != layout.input_scale]
        return layout.read(*(self.tensor(f"{module}.{ending}") for ending in endings))

    def unquantized(self, name: str) -> Tensor:
        """A tensor of the model by its name in an unquantized checkpoint: dequantized, or as it is stored."""
        module, _, kind = name.rpartition(".")
        return self.weight(module) if kind == "weight" and module in self.layouts else self.tensor(name)

    def expected(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape by name of what a reader needs, from transformers' parameters and what is declared."""
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for source in (source for parameter in self.parameters.values() for source in parameter.sources):
            module, _, kind = source.name.rpartition(".")
            layout = self.layouts.get(module)
            if kind != "weight" or layout is None:
                expected[source.name] = (torch.bfloat16, source.shape)
                continue
            rows, inputs = source.shape
            for ending, (dtype, covers) in layout.tensors.items():
                expected[f"{module}.{ending}"] = (dtype, (rows, inputs // covers) if covers else layout.scalar)
        if self.cache is not None and self.has_cache_scales:
            expected |= dict.fromkeys(self.cache.modules, (torch.float32, self.cache.scalar))
        return expected


def _linears(parameters: Mapping[str, Parameter]) -> dict[str, Source]:
    linear = (parameter for parameter in parameters.values() if parameter.linear)
    return {source.module: source for parameter in linear for source in parameter.sources}


def open_export(folder: Path) -> Client:
    """Read the configuration and the tables of contents, and check that they agree.

    Raises:
        VerificationError: a missing or broken file, configurations that contradict each other.
    """
    config = read_json(folder / "config.json")
    parameters = parameters_of(skeleton_of(config))
    quantization = config.get("quantization_config")
    declared = Declared()
    if quantization is not None:
        method = quantization.get("quant_method")
        if method not in READERS:
            raise VerificationError(f"{folder}: quant_method={method} cannot be verified; export again")
        declared = READERS[method](folder, quantization, list(_linears(parameters)))
    return Client(folder, config, tables(folder), parameters, declared)


def check_files(folder: Path) -> None:
    """Compare the small files with the checksums taken when they were written.

    Raises:
        VerificationError: names the file that changed.
    """
    for name, digest in read_json(folder / MANIFEST_FILE).get("files", {}).items():
        path = inside(folder, name, folder / MANIFEST_FILE)
        if not path.is_file() or file_digest(path) != digest:
            raise VerificationError(f"{path} is missing or changed since it was written; export again")


def check_tensors(client: Client, original: Path | None, look: Callable[[str, Tensor], None], advance: Advance) -> int:
    """Read every tensor once: checksum, dtype and shape, and ``look`` at its values; the number of tensors.

    Args:
        original: the checkpoint that was quantized. The export may hold tensors that transformers' model has no use
            for, if they are the original's.

    Raises:
        VerificationError: names the first tensor that changed, is missing, malformed, or of no use.
    """
    folder, expected = client.folder, client.expected()
    recorded = read_json(folder / MANIFEST_FILE).get("tensors", {})
    if set(recorded) != set(client.files):
        different = min(set(recorded) ^ set(client.files))
        raise VerificationError(
            f"{folder}: tensor {different} is in {MANIFEST_FILE} or in the files, not in both; export again"
        )
    carried = {name for name in client.files if name not in expected}
    originals = tables(original) if carried and original is not None else {}
    of_originals = TensorReader()
    for problem, names in (
        ("is missing", [name for name in expected if name not in client.files]),
        ("is not part of this model", sorted(carried - set(originals))),
    ):
        if names:
            raise VerificationError(f"{folder}: tensor {names[0]} {problem} ({len(names)} in all); export again")
    for done, (name, digest) in enumerate(recorded.items()):
        tensor = client.tensor(name)
        if tensor_digest(tensor) != digest:
            raise VerificationError(
                f"{folder}: tensor {name} changed since it was written (SHA-256 differs); export again"
            )
        if name in carried:
            _check_carried(client, name, digest, originals[name], of_originals)
        else:
            dtype, shape = expected[name]
            if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
                raise VerificationError(
                    f"{folder}: tensor {name} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}; "
                    "export again"
                )
            look(name, tensor)
        advance("tensors", done + 1, len(recorded))
    return len(recorded)


def _check_carried(client: Client, name: str, digest: str, original: Path, reader: TensorReader) -> None:
    if tensor_digest(reader.read(original, name)) != digest:
        raise VerificationError(
            f"{client.folder}: tensor {name}, which this model does not compute with, is not that of {original}; "
            "export again"
        )
