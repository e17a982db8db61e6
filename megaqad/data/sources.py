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
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaqad.data.settings import DataSettings
from megaqad.errors import UserError

HELD_OUT_SHARE = 0.05
FEWEST_FILES_TO_SPLIT = 20
"""Below this a split by file may hold out half of the text or none: the tail of every file is held out instead."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})

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
        """The bytes as they are on disk. Errors: `UserError` when the file cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): fix that or leave it out") from None

    def documents(self) -> Iterator[str]:
        """The texts in the file: one, or one per line of a .jsonl file.

        Errors: `UserError` naming the file and the byte offset (not UTF-8) or the line (not a JSON text record).
        """
        content = self.content()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}): "
                "convert it with iconv or leave it out of data.files"
            ) from None
        if self.path.suffix != ".jsonl":
            yield text
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _record_text(line, f"{self.path} line {number}")


def _record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): fix the line or leave it out") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f'{where} has no text: each line must be a JSON object with a string under "text"')
    return record["text"]


@dataclass(frozen=True)
class Split:
    """Which files train and which are held out. `by_tail`: the same files on both sides, each cut near its end."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    by_tail: bool


def name_share(name: str) -> float:
    """A fixed, evenly spread point in [0, 1) for a file name (the first 53 bits of its SHA-256)."""
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 11) / 2**53


def split_files(settings: DataSettings) -> Split:
    """Find the files `settings` speak of and decide what is held out; `random` has no training files.

    Errors: `UserError` when nothing matches, or when a file is named both for training and for validation.
    """
    explicit = find_files(settings.validation_files, "data.validation_files") if settings.validation_files else ()
    if settings.source == "random":
        return Split((), explicit, by_tail=False)
    if settings.source == "text" and not settings.files:
        raise UserError("data.files is empty: give data=<file.txt>, a directory or a glob, or data=stdlib")
    files = stdlib_files() if settings.source == "stdlib" else find_files(settings.files, "data.files")
    if explicit:
        both = {file.path.resolve() for file in files} & {file.path.resolve() for file in explicit}
        if both:
            raise UserError(f"{min(both)} is in data.files and in data.validation_files: it may only be in one of them")
        return Split(files, explicit, by_tail=False)
    if len(files) < FEWEST_FILES_TO_SPLIT:
        return Split(files, files, by_tail=True)
    held_out = tuple(file for file in files if name_share(file.name) < HELD_OUT_SHARE) or files[:1]
    return Split(tuple(file for file in files if file not in held_out), held_out, by_tail=False)


def find_files(patterns: list[str], setting: str) -> tuple[SourceFile, ...]:
    """Expand files, directories and globs; names are relative to the deepest folder that holds all of them.

    Returns each file once, in the order of `name_share`. Errors: `UserError` when a pattern matches no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = _expand(pattern)
        if not matches:
            wanted = f" with one of the endings {', '.join(sorted(TEXT_SUFFIXES))}" if Path(pattern).is_dir() else ""
            raise UserError(f"{setting}: no file matches {pattern}{wanted} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(path.absolute() for path in matches))
    folder = Path(os.path.commonpath([path.parent for path in found]))
    return _in_order([SourceFile(path.relative_to(folder).as_posix(), path) for path in found])


def _expand(pattern: str) -> list[Path]:
    """The files a pattern stands for; a directory's hidden files and folders (.git, .venv) are left out."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()]
        return [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]


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
