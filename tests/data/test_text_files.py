"""A data file is read as what it is, or its kind is named: no brace, mark or byte of a container is trained on."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaqad.data.text_files import documents
from megaqad.errors import UserError

RECORDS = [{"text": "first\nline"}, {"text": "zwei ü", "more": 3}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def texts(name: str, content: bytes | str) -> list[str]:
    stored = content.encode() if isinstance(content, str) else content
    return [text for _, text in documents(Path(name), stored)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "A.JSONL", "a.txt", "a"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\r\n\r\n"),
        "\ufeff" + LINES,
        json.dumps(RECORDS),
        "\n" + json.dumps(RECORDS, indent=2),
        LINES.rstrip(),
    ],
    ids=["lines", "Windows lines, blank ones", "byte order mark", "array", "indented array", "no last line end"],
)
def test_records_are_recognised(name: str, content: str) -> None:
    assert texts(name, content) == ["first\nline", "zwei ü"]


def test_one_object_is_one_document() -> None:
    assert texts("a.json", json.dumps(RECORDS[0], indent=2)) == ["first\nline"]


@pytest.mark.parametrize("text", ["[1] A footnote.\n", "{ not JSON\n", "[]\n[x]", "3\n4\n", "ab\x0c\u2028c"])
def test_text_is_text(text: str) -> None:
    assert texts("a.txt", text) == [text]


def test_a_byte_order_mark_is_not_trained_on() -> None:
    assert texts("a.txt", b"\xef\xbb\xbfwords") == ["words"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            gzip.compress(b"words", mtime=0),
            "gzip, compressed: unpack it; what can be read is UTF-8 text, or JSON lines",
        ),
        (b"\x28\xb5\x2f\xfd and", "zstd, compressed"),
        (b"PAR1\x15\x04", "Parquet, no text: write its text column as JSON lines"),
        (b"PK\x03\x04", "a zip archive"),
        ("words".encode("utf-16"), "UTF-16, another encoding: convert it with `iconv"),
        (np.arange(9, dtype=np.int32).tobytes(), r"no text \(a zero byte at offset 0\)"),
        (b"caf\xe9", r"not UTF-8 \(byte 0xe9 at offset 3\)"),
    ],
    ids=["gzip", "zstd", "Parquet", "zip", "UTF-16", "integers", "Latin-1"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.bin"])
def test_other_kinds_are_named(content: bytes, said: str, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is {said}"):
        texts(name, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LINES + "{", r"a\.jsonl line 3 is not JSON"),
        ('[{"text": "a"}, {"txt": "b"}]', r"a\.jsonl item 2 has no text"),
        ('{"messages": []}\n{"messages": []}', r"line 1 has no text: each record must be"),
        ('{"text": "\\ud83d"}', r"holds half of a surrogate pair \(.ud83d at character 0\)"),
        ("[" * 100_000, r"line 1 is not JSON"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", r"line 1 is not JSON"),
    ],
)
def test_records_without_text_are_named(content: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        texts("a.jsonl", content)
    assert "\n" not in str(refusal.value)


PIECES = [*'[]{}:," \n', '"text"', "\\ud800", "\ufeff", "a"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_anything_is_read_or_refused_in_one_line(content: bytes | str) -> None:
    for name in ("a.txt", "a.json"):
        said = ""
        try:
            for text in texts(name, content):
                text.encode("utf-8")
        except UserError as error:
            said = str(error)
        assert "\n" not in said
