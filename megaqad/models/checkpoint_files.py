"""The safetensors files of a checkpoint, known from their headers alone.

A safetensors file is: 8 bytes length, that many bytes of JSON (name -> dtype, shape, byte range), then the data. The
headers of a 70B checkpoint are a few hundred KB, so everything that can be wrong with names, shapes and lengths is
found without reading a weight and without torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megaqad.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""The format's own limit on a header's length in bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """The format's name: BF16, F16, F32, U8, F8_E4M3, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file.

    Raises:
        UserError: no such file, shorter than its header says, or not safetensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; copy the missing file from the original checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LONGEST_HEADER:
            raise UserError(f"{path} is not a safetensors file ({size} bytes, header length {length}); copy it again")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path} is truncated: {size} bytes, its header alone needs {8 + length}; copy it again")
    entries, end = _parse(path, text, 8 + length)
    if size != end:
        state = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{path} is {state}: {size} bytes instead of {end}; copy it again")
    return entries


def _parse(path: Path, text: bytes, base: int) -> tuple[dict[str, TensorEntry], int]:
    """Entries of a header and the byte at which the file must end."""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            name: TensorEntry(
                file=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                begin=base + entry["data_offsets"][0],
                end=base + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a safetensors file (header: {error!r}); copy it again") from error
    return entries, max((entry.end for entry in entries.values()), default=base)


def read_headers(model_dir: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint directory: through its index when there is one, else ``model.safetensors``.

    Raises:
        UserError: neither file, a broken index, an index that names a file outside the directory or a tensor that
            its file does not hold, or a file that ``read_header`` refuses.
    """
    model_dir = Path(model_dir)
    index = model_dir / INDEX_FILE
    if not index.is_file():
        if not (model_dir / SINGLE_FILE).is_file():
            raise UserError(
                f"{model_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}; convert the checkpoint to safetensors "
                "(save_pretrained of transformers does)"
            )
        return read_header(model_dir / SINGLE_FILE)
    entries: dict[str, TensorEntry] = {}
    weight_map = _weight_map(index)
    for name in sorted(set(weight_map.values())):
        path = PurePosixPath(name)
        # Lexical on purpose: the Hugging Face cache keeps its files behind links that lead out of the directory.
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{index} names the file {name!r} outside {model_dir}; restore the original index")
        entries.update(read_header(model_dir / path))
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file != model_dir / name:
            raise UserError(f"{index} says {tensor} is in {name}, it is not; restore the original index and files")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(value, str) for value in weight_map.values()):
            raise TypeError("weight_map values must be file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index ({error!r}); restore the original one") from error
    return dict(weight_map)
