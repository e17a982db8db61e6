"""The safetensors files of a checkpoint, known from their headers alone.

A safetensors file is: 8 bytes length, that many bytes of JSON (name -> dtype, shape, byte range), then the data. The
headers of a 70B checkpoint are a few hundred KB, so everything that can be wrong with names, shapes and lengths is
found without reading a weight and without torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megaqad.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
"""Endings of files with weights that are not read."""
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
    try:
        with safe_open(path, framework="numpy"):  # checks dtypes and shapes against the bytes, and gaps
            return entries
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({' '.join(str(error).split())}); copy it again") from error


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


@dataclass(frozen=True)
class WeightFiles:
    """Which files of a directory hold the weights, by transformers' rule: ``model.safetensors``, else the index."""

    names: tuple[str, ...]
    weight_map: dict[str, str]
    """The index's file of each tensor; empty without an index."""
    note: str | None = None
    """What is passed over, for people."""


def weight_files(model_dir: Path) -> WeightFiles:
    """Those of ``model_dir``.

    Raises:
        UserError: none; a broken index, or one that names files outside the directory; a single file beside all the
            files of an index, of which one is another model's.
    """
    index = model_dir / INDEX_FILE
    has_single = (model_dir / SINGLE_FILE).is_file()
    if not index.is_file():
        if not has_single:
            raise UserError(f"{model_dir} {_no_weights(model_dir)}")
        return WeightFiles((SINGLE_FILE,), {})
    weight_map = _weight_map(index)
    names = tuple(sorted(set(weight_map.values())))
    for name in names:
        path = PurePosixPath(name)
        # Lexical on purpose: the Hugging Face cache keeps its files behind links that lead out of the directory.
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{index} names the file {name!r} outside {model_dir}; restore the original index")
    try:
        missing = [name for name in names if not (model_dir / name).is_file()]
    except (OSError, ValueError) as error:  # too long, a zero byte, no characters
        raise UserError(f"{index} names a file that cannot be ({_short(error)}); restore the original index") from error
    if not has_single or SINGLE_FILE in names:
        return WeightFiles(names, weight_map)
    if not missing:
        raise UserError(
            f"{model_dir} holds {SINGLE_FILE}, which transformers reads, and {INDEX_FILE} with other files ({names[0]} "
            "..), which engines may read; remove one of the two"
        )
    note = f"{SINGLE_FILE} is read; {INDEX_FILE} beside it names {missing[0]}, which is not there"
    return WeightFiles((SINGLE_FILE,), {}, note)


def _short(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or " ".join(str(error).split())


def _no_weights(model_dir: Path) -> str:
    """What a directory has in place of weights that can be read, and the way out."""
    names = sorted(path.name for path in model_dir.iterdir() if path.is_file()) if model_dir.is_dir() else []
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"holds {shards[0]} without {INDEX_FILE}; copy the index from the original checkpoint"
    others = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    if others:
        return (
            f"holds its weights in {others[0]}, which is not read: only safetensors are; load it with transformers and "
            "write it with save_pretrained"
        )
    return f"holds neither {SINGLE_FILE} nor {INDEX_FILE}; copy the missing files from the original checkpoint"


def read_headers(model_dir: Path, files: WeightFiles | None = None) -> dict[str, TensorEntry]:
    """All tensors in the ``weight_files`` of a checkpoint directory, whether its index names them or not. One that the
    index names and no file holds is left out: whether it is needed, the model says.

    Args:
        files: ``weight_files(model_dir)``, where it is known already.

    Raises:
        UserError: as ``weight_files`` and ``read_header``; a tensor in two files without an index that chooses one.
    """
    model_dir = Path(model_dir)
    files = files or weight_files(model_dir)
    entries: dict[str, TensorEntry] = {}
    for name in files.names:
        for tensor, entry in read_header(model_dir / name).items():
            chosen, other = files.weight_map.get(tensor), entries.get(tensor)
            if other is None or chosen == name:
                entries[tensor] = entry
            elif chosen is None or other.file != model_dir / chosen:
                raise UserError(
                    f"{tensor} is in {other.file} and in {name}, and {INDEX_FILE} names neither; restore the original "
                    "files"
                )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(value, str) for value in weight_map.values()):
            raise TypeError("weight_map must be file names by tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index ({error!r}); restore the original one") from error
    return dict(weight_map)
