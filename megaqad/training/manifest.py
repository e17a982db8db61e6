"""The manifest of a checkpoint: every file with its size and sha256, written last, checked before anything is read.

A checkpoint without a manifest is unfinished. One whose files differ from it is damaged: a disk that lied, a copy that
was cut off, a bit that flipped. Both are named and passed over, never loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from megaqad.runtime.files import FileDigest, digest_of, write_text_whole

FILE = "manifest.json"


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be loaded; the message says which file is wrong and how."""


def write_manifest(directory: Path, files: Mapping[str, FileDigest]) -> None:
    """Finish a checkpoint: ``files`` by their path in ``directory``, with what was read back from the disk."""
    text = json.dumps({"files": {name: asdict(digest) for name, digest in sorted(files.items())}}, indent=1)
    write_text_whole(directory / FILE, text + "\n")


def read_manifest(directory: Path) -> dict[str, FileDigest]:
    """The files a checkpoint must have.

    Raises:
        DamagedCheckpoint: there is no manifest, it is cut off, or it names a file outside of the directory.
    """
    path = directory / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileDigest(int(one["size"]), str(one["sha256"])) for name, one in content["files"].items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing: the checkpoint was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error})") from error
    for name in files:
        if not stays_inside(name):
            raise DamagedCheckpoint(f"{path} names {name!r}, which is outside of the checkpoint")
    return files


def stays_inside(name: str) -> bool:
    """Whether a relative path, as text, cannot leave the directory that it is relative to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_size(directory: Path, name: str, expected: FileDigest) -> None:
    """Look whether a file is there, and whole as far as its size tells.

    Raises:
        DamagedCheckpoint: it is missing, or of another size.
    """
    path = directory / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    if size != expected.size:
        raise DamagedCheckpoint(f"{path} has {size} bytes instead of {expected.size}")


def check_file(directory: Path, name: str, expected: FileDigest) -> None:
    """Read one file of a checkpoint and compare it with the manifest.

    Raises:
        DamagedCheckpoint: it is missing, unreadable, of another size or content.
    """
    check_size(directory, name, expected)
    path = directory / name
    try:
        found = digest_of(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    if found != expected:
        raise DamagedCheckpoint(f"{path} has changed since it was written (sha256 {found.sha256[:12]}...)")
