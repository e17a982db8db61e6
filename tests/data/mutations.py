"""Damaged data files: bytes and records changed at random. Read to the tokens of their text, or refused in one line.

``python -m tests.data.mutations 10000`` tries as many and says how often each outcome was seen.
"""

import gzip
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from megaqad.config.settings import BUNDLED_TEACHER
from megaqad.data import DataSettings
from megaqad.data.sources import split_files
from megaqad.data.text_files import documents
from megaqad.data.tokens import load_tokenizer, text_tokens
from megaqad.errors import UserError

NAMES = ("a.txt", "a.jsonl", "a.json", "a.NDJSON", "a.md", "a.py", "a.bin", "a", "a.csv")
TEXTS = (
    "plain words",
    "\u00e9\U0001f600\u2028",
    "<|endoftext|>",
    "",
    "a\r\nb\n\n",
    "{",
    "[1]",
    '{"text": 1}',
    "\ufeffx",
)
VALUES: tuple[Any, ...] = (*TEXTS, None, 1, True, [], ["a"], {}, {"text": "a"}, "\ud800", "\x00", "w " * 3000)


def content_of(rng: random.Random) -> bytes:
    values = [rng.choice(TEXTS if rng.random() < 0.9 else VALUES) for _ in range(rng.randint(0, 4))]
    records = [{"text" if rng.random() < 0.95 else "txt": value} for value in values]
    kind = rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 5))
    if kind == 0:
        return rng.choice(TEXTS).encode()
    if kind == 1:
        return json.dumps(records, indent=rng.choice((None, 1))).encode()
    if kind == 2:
        return "".join(f"{json.dumps(record)}\n" for record in records).encode()
    if kind == 3:
        return rng.randbytes(rng.randint(0, 200))
    if kind == 4:
        return rng.choice(TEXTS).encode(rng.choice(("utf-8-sig", "utf-16", "utf-32", "utf-8")), "surrogatepass")
    return gzip.compress(b"words") if rng.random() < 0.2 else ("words " * 50 + rng.choice(TEXTS)).encode()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, or the end cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed))] if changed and rng.random() < 0.2 else changed)


def outcome(path: Path, content: bytes, cache: Path, tokenizer: Any) -> str:
    """What becomes of a file; asserts one line, or that the tokens are those of its documents."""
    refusal = ""
    try:
        split = split_files(DataSettings(files=[str(path)], validation_files=[str(path.with_name("held_out.txt"))]))
        arrays = text_tokens(split, BUNDLED_TEACHER, cache)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal, refusal
        assert path.name in refusal, refusal
        return "refused"
    end = "<|endoftext|>"
    texts = [text for _, text in documents(path, content) if text]
    expected = "".join(text if text.endswith(end) else text + end for text in texts)
    assert tokenizer.decode(arrays.train) == expected
    return "read"


def check(count: int, seed: int = 0) -> Counter[str]:
    """How often each outcome was seen for so many files."""
    seen: Counter[str] = Counter()
    tokenizer = load_tokenizer(BUNDLED_TEACHER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "held_out.txt").write_text("some words that are held out")
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            path = folder / rng.choice(NAMES)
            content = damaged(content_of(rng), rng)
            path.write_bytes(content)
            try:
                seen[outcome(path, content, folder / "cache", tokenizer)] += 1
            except BaseException:
                print(f"number {number} of seed {seed}: {path.name} {content[:200]!r}", file=sys.stderr)
                raise
            path.unlink()
    return seen


if __name__ == "__main__":
    print(dict(check(int(sys.argv[1]), *map(int, sys.argv[2:]))))
