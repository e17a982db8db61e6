"""Files that survive: written whole or not at all, flushed to the disk, checked by reading them back.

A file that must never be seen half-written is written under another name, flushed (``fsync``), renamed, and the
directory's own entry flushed too: after a power cut there is the old content or the new, never a mixture. Everything
is created by plain ``open``, so its permissions follow the user's umask (the safetensors library's ``save_file`` leaves
0600 behind, which locks colleagues out of a shared run).

Weights are safetensors: eight bytes of header length, a JSON header, raw little-endian data. Writing it here takes
fifty lines and gives the digest of the bytes in the same pass, or takes tensors as they come, one in memory at a time.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 16 * 1024 * 1024
"""Bytes written and hashed at a time: large enough for a disk, small enough for a cache."""

SAFETENSORS_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order in which the safetensors library lays tensors out, so that our files are its files byte for byte: wide
elements first, which keeps every tensor aligned, and by name within a dtype."""


@dataclass(frozen=True)
class Description:
    """A tensor of a safetensors file, in the file's terms."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> "Description":
        return cls(name, SAFETENSORS_DTYPES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize)


@dataclass(frozen=True)
class FileDigest:
    """What a file must be to be the one that was written."""

    size: int
    """Bytes."""
    sha256: str
    """Of the whole content, 64 hex digits."""


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries: the names in it, not the files' contents."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_whole(path: Path, text: str) -> FileDigest:
    """``write_bytes_whole`` of ``text`` in UTF-8; what is no character (a file's name may hold such) is escaped."""
    return write_bytes_whole(path, text.encode("utf-8", "backslashreplace"))


def write_bytes_whole(path: Path, content: bytes) -> FileDigest:
    """Replace ``path`` by ``content``: a reader, also one after a crash, sees the old file or the new one.

    Raises:
        OSError: as from ``open``, ``write`` or ``fsync``; ``path`` is then what it was.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return FileDigest(len(content), hashlib.sha256(content).hexdigest())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileDigest:
    """Write tensors of any shape and device to a new safetensors file and flush it.

    Args:
        path: must not exist.
        tensors: each is moved and made contiguous on its own. Laid out as the safetensors library does.
        metadata: strings for the header's ``__metadata__``.

    Returns:
        The digest of what was handed to the system, to compare with what can be read back.

    Raises:
        OSError: the disk is full, the directory is read-only, ...
    """
    beginning, places = _layout([Description.of(name, one.shape, one.dtype) for name, one in tensors.items()], metadata)
    digest = hashlib.sha256(beginning)
    size = len(beginning)
    with path.open("xb") as file:
        file.write(beginning)
        for name in places:
            for block in _blocks(tensors[name]):
                file.write(block)
                digest.update(block)
                size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(size, digest.hexdigest())


def write_safetensors_as_they_come(
    path: Path, tensors: Iterable[tuple[str, Tensor]], described: Sequence[Description], metadata: Mapping[str, str]
) -> None:
    """The file of ``write_safetensors`` from tensors in any order, each let go before the next is asked for.

    Args:
        described: what ``tensors`` gives.
    """
    beginning, places = _layout(described, metadata)
    shapes = {one.name: one.shape for one in described}
    with path.open("xb") as file:
        file.write(beginning)
        for name, tensor in tensors:
            assert shapes.pop(name) == tuple(tensor.shape), f"{name} has another shape than was said"
            file.seek(len(beginning) + places[name])
            for block in _blocks(tensor):
                file.write(block)
        assert not shapes, f"{sorted(shapes)} did not come"
        file.flush()
        os.fsync(file.fileno())


def _layout(described: Sequence[Description], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where after it each tensor lies, in order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    dtypes, offset = list(SAFETENSORS_DTYPES.values()), 0
    for one in sorted(described, key=lambda one: (dtypes.index(one.dtype), one.name)):
        places[one.name], end = offset, offset + one.nbytes
        header[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, at most ``BLOCK_BYTES`` at a time."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def digest_of(path: Path, *, from_disk: bool = False) -> FileDigest:
    """Read a file and say what it is.

    Args:
        from_disk: ask the system to forget its cached copy first, so that what is read is what the disk gives. A hint:
            file systems that keep no cache, or cannot drop it, ignore it.

    Raises:
        OSError: as from ``open`` and ``read``.
    """
    with path.open("rb") as file:
        if from_disk and sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.file_digest(file, "sha256")
        return FileDigest(file.tell(), digest.hexdigest())


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system of ``directory`` (or of its nearest parent)."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free
