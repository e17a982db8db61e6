"""A checksum of every exported tensor, so that a changed byte is found and named.

The writer hashes what it hands to the disk, before it is written: a fault of the disk, of a copy or of an editor
shows against it. ``megaqad_manifest.json`` lies beside the weights; engines ignore it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaqad

MANIFEST_FILE = "megaqad_manifest.json"


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes in row-major order."""
    data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()  # hashed in place, not copied
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest:
    """Checksums gathered while the tensors pass by."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream, remembered."""
        for name, tensor in tensors:
            self._tensors[name] = tensor_digest(tensor)
            yield name, tensor

    def content(self, files: Sequence[Path], note: str | None) -> dict[str, Any]:
        """What ``megaqad_manifest.json`` holds: the tensors seen, the names of the ``files`` that hold them, checksums
        of the other, small ones, and the plan's note."""
        weights = [path.name for path in files if path.suffix == ".safetensors"]
        small = [path for path in files if path.is_file() and path.name not in weights]
        folders = [path.name for path in files if path.is_dir()]
        return {
            "producer": {"name": "megaqad", "version": megaqad.__version__},
            "tensors": self._tensors,
            "weights": [*weights, *folders],
            "files": {path.name: file_digest(path) for path in small},
            **({} if note is None else {"note": note}),
        }
