"""Tensors of the original checkpoint that its model does not compute with: heads for several tokens, vision towers.

They go to the export as they are, so that it holds what the original had.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megaqad.models.architecture import Architecture
from megaqad.models.checkpoint_files import TensorEntry
from megaqad.models.checks import unused_tensors
from megaqad.models.encodings import Checkpoint


def carried_tensors(architecture: Architecture, model_dir: Path) -> dict[str, TensorEntry]:
    """Those that ``model_dir`` holds, in its order."""
    checkpoint = Checkpoint(model_dir)
    return {name: checkpoint.entries[name] for name in unused_tensors(architecture, checkpoint)}


def read_carried(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), one at a time."""
    for name, entry in entries.items():
        with safe_open(entry.file, framework="pt") as file:
            yield name, file.get_tensor(name)
