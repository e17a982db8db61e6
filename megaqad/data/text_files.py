"""What is in a data file: its kind, told by its first bytes, its content and its name, and the documents that it holds.

A file is text, one document, or JSON records, one document each: a file whose name says so (.jsonl, .ndjson, .json, in
any case), and one that begins with a JSON object whatever its name, because nobody wants a model that learnt braces.
Records stand on lines of their own or in one array.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megaqad.errors import UserError

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
READABLE = 'UTF-8 text, or JSON lines or a JSON array of objects with a string under "text"'

_COMPRESSED = "compressed: unpack it"
_CONVERT = "no text: write its text column as JSON lines"
FIRST_BYTES = (
    (b"\x1f\x8b", "gzip", _COMPRESSED),
    (b"\x28\xb5\x2f\xfd", "zstd", _COMPRESSED),
    (b"BZh", "bzip2", _COMPRESSED),
    (b"\xfd7zXZ\x00", "xz", _COMPRESSED),
    (b"PK\x03\x04", "a zip archive, as PyTorch's .bin and .pt are", "no text: unpack it, or leave it out"),
    (b"PAR1", "Parquet", _CONVERT),
    (b"ARROW1", "Arrow", _CONVERT),
    (b"MMIDIDX", "an index of Megatron", "no text: give the text that it was made of"),
    (b"%PDF", "PDF", "no text: extract it"),
    (codecs.BOM_UTF16_LE, "UTF-16", "another encoding: convert it with `iconv -f UTF-16 -t UTF-8`"),
    (codecs.BOM_UTF16_BE, "UTF-16", "another encoding: convert it with `iconv -f UTF-16 -t UTF-8`"),
)
"""(how files of a kind begin, its name, what to do)."""


class Document(NamedTuple):
    """One text and where it is from, for messages."""

    where: str
    text: str


def read_bytes(path: Path) -> bytes:
    """The bytes as they are on disk. Errors: `UserError` when the file cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix that or leave it out") from None


def documents(path: Path, content: bytes) -> Iterator[Document]:
    """The texts of a file with this content.

    Errors: `UserError` naming the file and its kind, the byte offset (not UTF-8) or the record (not JSON, no text).
    """
    text = _decoded(path, content)
    records = _records(path, text)
    if records is None:
        yield Document(str(path), text)
        return
    for where, record in records:
        yield Document(where, _record_text(record, where))


def begins_with_text(path: Path) -> bool:
    """Whether a document can be read from a file: of a directory's .json files most hold settings."""
    try:
        return next(documents(path, read_bytes(path)), None) is not None
    except UserError:
        return False


def _decoded(path: Path, content: bytes) -> str:
    for first, kind, advice in FIRST_BYTES:
        if content.startswith(first):
            raise UserError(f"{path} is {kind}, {advice}; what can be read is {READABLE}")
    zero = content.find(b"\x00")
    if zero >= 0:
        raise UserError(f"{path} is no text (a zero byte at offset {zero}); what can be read is {READABLE}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}): convert it with "
            "iconv or leave it out of data.files"
        ) from None


def _parsed(text: str) -> Any:
    """The value of JSON text, None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _records(path: Path, text: str) -> Iterable[tuple[str, Any]] | None:
    """(where, value) of every record: items of an array, the one object of a file, or the lines. None where neither the
    file's name nor what it begins with says that it holds records."""
    named, start = path.suffix.lower() in RECORD_SUFFIXES, text.lstrip()
    if not named and not start.startswith(("{", "[")):
        return None
    whole = _parsed(text)
    if isinstance(whole, list) and (named or (whole and isinstance(whole[0], dict))):
        return ((f"{path} item {number}", record) for number, record in enumerate(whole, start=1))
    if isinstance(whole, dict):
        return [(str(path), whole)]
    if named or isinstance(_parsed(start.split("\n", 1)[0]), dict):
        return _lines(path, text)
    return None


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path} line {number}", _record(line, f"{path} line {number}")


def _record(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where} is not JSON ({reason}): fix the line or leave it out") from None


def _record_text(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no text: each record must be a JSON object with a string under "text"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x} at character {error.start}), no "
            "character: fix the record or leave it out"
        ) from None
    return text
