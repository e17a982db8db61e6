"""From a user's words ("this folder", "stdlib") to named documents, and which of them are held out.

Everything here depends on file *names relative to their common folder* and on file contents, never on the order in
which a file system lists them, on absolute paths or on dates. So two machines with the same files see the same data.

The split needs no random generator and no list of files kept somewhere: `name_share` maps a name to a fixed point in
[0, 1) through SHA-256, and the files below `HELD_OUT_SHARE` are held out. A file keeps its side when others are added
or removed, and under another version of Python. The same number orders the files, which is a fixed shuffle: a
truncated held-out set is then a fair sample, not "everything under `a`".
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megaqad.data.settings import DataSettings
from megaqad.data.text_files import RECORD_SUFFIXES, Document, begins_with_text, documents, read_bytes
from megaqad.errors import UserError

HELD_OUT_SHARE = 0.05
FEWEST_FILES_TO_SPLIT = 20
"""Below this a split by file may hold out half of the text or none: the tail of every file is held out instead."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py"}) | RECORD_SUFFIXES
"""Of the files that are read of a directory, in any case."""

STDLIB_SKIPPED = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__"),  # not the standard library
        *("test", "tests", "idlelib", "lib2to3"),  # left out by some distributions
        *("encodings", "pydoc_data"),  # generated tables and a copy of the manual: 2 MB that teach nothing
    }
)


@dataclass(frozen=True)
class SourceFile:
    """One file of text: where it is and the name that decides its side of the split and its place in the order."""

    name: str
    path: Path

    def content(self) -> bytes:
        """As `text_files.read_bytes`."""
        return read_bytes(self.path)

    def documents(self) -> Iterator[Document]:
        """As `text_files.documents`."""
        return documents(self.path, self.content())


@dataclass(frozen=True)
class Split:
    """Which files train and which are held out. `by_tail`: the same files on both sides, each cut near its end."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    by_tail: bool
    left_out: tuple[Path, ...] = ()
    """Files of a directory that hold no text which can be read."""


def name_share(name: str) -> float:
    """A fixed, evenly spread point in [0, 1) for a file name (the first 53 bits of its SHA-256)."""
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 11) / 2**53


def split_files(settings: DataSettings) -> Split:
    """Find the files `settings` speak of and decide what is held out; `random` has no training files.

    Errors: `UserError` when nothing matches, or when a file is named both for training and for validation.
    """
    explicit, left_out = find_files(settings.validation_files, "data.validation_files")
    if settings.source == "random":
        return Split((), explicit, by_tail=False, left_out=left_out)
    if settings.source == "text" and not settings.files:
        raise UserError("data.files is empty: give data=<file.txt>, a directory or a glob, or data=stdlib")
    found = Found(stdlib_files(), ()) if settings.source == "stdlib" else find_files(settings.files, "data.files")
    files, left_out = found.files, tuple(dict.fromkeys((*found.left_out, *left_out)))
    if explicit:
        both = {file.path.resolve() for file in files} & {file.path.resolve() for file in explicit}
        if both:
            raise UserError(f"{min(both)} is in data.files and in data.validation_files: it may only be in one of them")
        return Split(files, explicit, by_tail=False, left_out=left_out)
    if len(files) < FEWEST_FILES_TO_SPLIT:
        return Split(files, files, by_tail=True, left_out=left_out)
    held_out = tuple(file for file in files if name_share(file.name) < HELD_OUT_SHARE) or files[:1]
    train = tuple(file for file in files if file not in held_out)
    return Split(train, held_out, by_tail=False, left_out=left_out)


class Found(NamedTuple):
    """What patterns stand for."""

    files: tuple[SourceFile, ...]
    left_out: tuple[Path, ...]
    """As in `Split`."""


def find_files(patterns: list[str], setting: str) -> Found:
    """Expand files, directories and globs; names are relative to the deepest folder that holds all of them.

    Returns each file once, in the order of `name_share`. Errors: `UserError` when a pattern matches no file.
    """
    if not patterns:
        return Found((), ())
    found: dict[Path, None] = {}
    passed_over: dict[Path, None] = {}
    for pattern in patterns:
        matches, others = _expand(pattern)
        passed_over.update(dict.fromkeys(path.absolute() for path in others))
        if not matches:
            wanted = f" with one of the endings {', '.join(sorted(TEXT_SUFFIXES))}" if Path(pattern).is_dir() else ""
            several = f"; several are written {setting}=[{pattern}]" if "," in pattern else ""
            raise UserError(f"{setting}: no file matches {pattern}{wanted} (looked from {Path.cwd()}){several}")
        found.update(dict.fromkeys(path.absolute() for path in matches))
    folder = Path(os.path.commonpath([path.parent for path in found]))
    files = _in_order([SourceFile(path.relative_to(folder).as_posix(), path) for path in found])
    return Found(files, tuple(path for path in passed_over if path not in found))


def _expand(pattern: str) -> tuple[list[Path], list[Path]]:
    """The files a pattern stands for, and those of a directory that hold no text; hidden ones (.git, .venv) are none
    of it."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path], []
    if not path.is_dir():
        return [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()], []
    inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
    shown = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    texts = {
        p for p in shown if p.suffix.lower() in TEXT_SUFFIXES and (p.suffix.lower() != ".json" or begins_with_text(p))
    }
    return [p for p in shown if p in texts], [p for p in shown if p not in texts]


def stdlib_files() -> tuple[SourceFile, ...]:
    """The Python files of the running interpreter's standard library that are the same on every machine.

    Left out: `STDLIB_SKIPPED`, the build's own facts (`_sysconfigdata*`, `config-*`), and files that are empty or not
    UTF-8. Names are relative to the library's folder. Errors: `UserError` when the interpreter came without sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        machine_made = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
        if not (STDLIB_SKIPPED & set(name.parts) or machine_made) and _is_text(path):
            found.append(SourceFile(name.as_posix(), path))
    if not found:
        raise UserError(f"data=stdlib: no Python sources under {folder}: give data=<file.txt> instead")
    return _in_order(found)


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (UnicodeDecodeError, OSError):
        return False


def _in_order(files: list[SourceFile]) -> tuple[SourceFile, ...]:
    return tuple(sorted(files, key=lambda file: (name_share(file.name), file.name)))
