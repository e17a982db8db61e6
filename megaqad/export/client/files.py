"""The files of an export and their tables of contents, read without trust."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaqad.errors import UserError


class VerificationError(UserError):
    """The exported files are not what they should be; the message names the first thing that is wrong."""


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


def tables(folder: Path) -> dict[str, Path]:
    """File by tensor name, through the index when there is one.

    Raises:
        VerificationError: a file that cannot be read, or an index that does not list what its files hold.
    """
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
        VerificationError: it is not.
    """
    if Path(name).name != name or name == "..":
        raise VerificationError(f"{said_by} names {name!r}, which is no file of {folder}; export again")
    return folder / name


class TensorReader:
    """Reads tensors, and keeps the file that it read last open: with experts a file's table of contents has thousands
    of rows, and takes longer to read than most of its tensors."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def read(self, path: Path, name: str) -> Tensor:
        if path != self._path:
            self._file = safe_open(path, framework="pt")
            self._path = path
        tensor: Tensor = self._file.get_tensor(name)
        return tensor
