"""Text to token arrays, once per machine: tokenize, keep on disk, map into memory.

Tokenizing is slow and every rank of every run needs the same result, so it is kept in a cache folder whose name is a
hash of everything that went in: file names and contents, the split, the tokenizer's files. A changed byte anywhere is
another folder; nothing is ever updated in place. A folder is written under a temporary name and renamed when it is
complete, so a reader sees all of it or nothing, and two writers at once do no harm (the second drops its copy).

    $MEGAQAD_CACHE or ~/.cache/megaqad
      tokens/<hash>/train.npy, validation.npy    int32 [N], a document begins as the tokenizer begins one
                                               (often with <s>) and is followed by its end token
                    facts.json                   counts a report wants, largest token id

int32 is half the memory of the int64 that embedding layers take; a batch is widened when it is cut.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megaqad.data.sources import HELD_OUT_SHARE, SourceFile, Split
from megaqad.errors import StoppedEarly, UserError

LAYOUT_VERSION = 2
"""Part of the cache's hash: raise it when the same input must give other arrays."""

PIECE_CHARACTERS = 4_000_000
"""A longer document is tokenized in pieces cut after a line's end: tokenizers keep about 100 bytes per token."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenArrays:
    """Both sides of the split as memory-mapped arrays.

    train, validation: int32 [N]. fingerprint: 64 hex digits for contents, split and tokenizer.
    """

    train: Tokens
    validation: Tokens
    fingerprint: str
    facts: "TokenFacts"


@dataclass(frozen=True)
class TokenFacts:
    """What tokenizing found out: written beside the arrays, shown in logs and reports."""

    train_tokens: int
    train_files: int
    train_bytes: int
    validation_tokens: int
    validation_files: int
    validation_bytes: int
    largest_token: int
    beginning: str
    """What every document begins with, as the tokenizer writes it; empty for tokenizers that add nothing."""


class Encoder(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


def cache_dir() -> Path:
    """`$MEGAQAD_CACHE`, or `~/.cache/megaqad`."""
    return Path(os.environ.get("MEGAQAD_CACHE") or "~/.cache/megaqad").expanduser()


def tokenizer_fingerprint(model_dir: Path) -> str:
    """SHA-256 over the tokenizer's files in `model_dir`. Errors: `UserError` when there is none."""
    present = [model_dir / name for name in TOKENIZER_FILES if (model_dir / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt") for path in present):
        raise UserError(f"{model_dir} has no tokenizer (tokenizer.json or tokenizer.model): copy the model's own there")
    digest = hashlib.sha256()
    for path in present:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load_tokenizer(model_dir: Path) -> Encoder:
    """The tokenizer of a Hugging Face folder. Errors: `UserError` when it is missing, broken or has no end token."""
    tokenizer_fingerprint(model_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except StoppedEarly:  # a signal that came in the meantime
        raise
    except Exception as error:  # the Rust tokenizers raise plain Exception for a broken file
        own = model_dir / "tokenizer_config.json"
        if own.is_file() and b'"auto_map"' in own.read_bytes():
            raise UserError(
                f"the tokenizer in {model_dir} is code of its own (auto_map in tokenizer_config.json), which is not "
                "run: give it as a tokenizer.json of one of transformers' classes"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer in {model_dir} cannot be loaded ({reason}): copy the model's own") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {model_dir} has no end token: set eos_token in tokenizer_config.json")
    return tokenizer


def beginning(tokenizer: Encoder) -> list[int]:
    """What the tokenizer puts before a text: often ``<s>``, often nothing. Engines put it before every prompt.

    Errors: `UserError` for a tokenizer that changes the text itself when it adds special tokens.
    """
    marked, plain = (
        tokenizer(["a"], add_special_tokens=special, verbose=False)["input_ids"][0] for special in (True, False)
    )
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return marked[:start]
    raise UserError(f"the tokenizer reads 'a' as {plain}, with its special tokens as {marked}: copy the model's own")


def text_tokens(split: Split, model_dir: Path, folder: Path | None = None) -> TokenArrays:
    """The arrays for `split` and the tokenizer in `model_dir`, from the cache or made now.

    `folder`: the cache's folder, `cache_dir()` when None. Errors: `UserError` for text that is not UTF-8 or empty, for
    a missing tokenizer, for a cache that cannot be written.
    """
    fingerprint = _fingerprint(split, model_dir)
    place = (folder or cache_dir()) / "tokens" / fingerprint
    if not place.is_dir():
        train, validation, facts = _tokenize(split, load_tokenizer(model_dir))
        _store(place, train, validation, facts)
    facts = TokenFacts(**json.loads((place / "facts.json").read_text()))
    # copy-on-write, because torch wants arrays it could write to; the files stay as they are
    train, validation = (np.load(place / f"{name}.npy", mmap_mode="c") for name in ("train", "validation"))
    return TokenArrays(train, validation, fingerprint, facts)


def _fingerprint(split: Split, model_dir: Path) -> str:
    def named(files: Iterable[SourceFile]) -> list[tuple[str, str]]:
        return [(file.name, hashlib.sha256(file.content()).hexdigest()) for file in files]

    held_out = None if split.by_tail else named(split.held_out)
    inputs = [LAYOUT_VERSION, HELD_OUT_SHARE, tokenizer_fingerprint(model_dir), named(split.train), held_out]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _tokenize(split: Split, tokenizer: Encoder) -> tuple[Tokens, Tokens, TokenFacts]:
    first = beginning(tokenizer)
    if split.by_tail:
        halves = [_cut_tail(_file_tokens(file, tokenizer, first)) for file in split.train]
        train, validation = _joined(head for head, _ in halves), _joined(tail for _, tail in halves)
    else:
        train = _joined(_file_tokens(file, tokenizer, first) for file in split.train)
        validation = _joined(_file_tokens(file, tokenizer, first) for file in split.held_out)
    for side, files, tokens in (("training", split.train, train), ("held-out", split.held_out, validation)):
        if files and len(tokens) < 2:
            others = f" and {len(files) - 1} others" if len(files) > 1 else ""
            amount = "no text" if not len(tokens) else f"{len(tokens)} token of text"
            raise UserError(f"there is {amount} for the {side} data in {files[0].path}{others}: give more text")
    facts = TokenFacts(
        train_tokens=len(train),
        train_files=len(split.train),
        train_bytes=sum(file.path.stat().st_size for file in split.train),
        validation_tokens=len(validation),
        validation_files=len(split.held_out),
        validation_bytes=sum(file.path.stat().st_size for file in split.held_out),
        largest_token=int(max(train.max(initial=0), validation.max(initial=0))),
        beginning="".join(tokenizer.convert_ids_to_tokens(first)),
    )
    return train, validation, facts


def _file_tokens(file: SourceFile, tokenizer: Encoder, first: list[int]) -> Tokens:
    """Every document of a file between `first` and the end token, each once: int32 [N]."""
    parts: list[Tokens] = []
    for where, document in file.documents():
        if document:
            parts.append(_document_tokens(where, document, tokenizer, first))
    return _joined(parts)


def _document_tokens(where: str, document: str, tokenizer: Encoder, first: list[int]) -> Tokens:
    try:
        pieces = tokenizer(list(_pieces(document)), add_special_tokens=False, verbose=False)["input_ids"]
    except StoppedEarly:
        raise
    except Exception as error:  # the Rust tokenizers raise plain Exception
        raise UserError(f"{where} cannot be tokenized ({error}): leave it out") from error
    tokens, end = _joined(np.asarray(piece, dtype=np.int32) for piece in pieces), tokenizer.eos_token_id
    begins = first and tokens[: len(first)].tolist() != first
    ends = len(tokens) == 0 or tokens[-1] != end
    return _joined([np.asarray(first if begins else [], np.int32), tokens, np.asarray([end] if ends else [], np.int32)])


def _pieces(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        cut = document.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield document[start:cut]
        start = cut
    yield document[start:]


def _cut_tail(tokens: Tokens) -> tuple[Tokens, Tokens]:
    cut = len(tokens) - round(len(tokens) * HELD_OUT_SHARE)
    return tokens[:cut], tokens[cut:]


def _joined(parts: Iterable[Tokens]) -> Tokens:
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])


def _store(place: Path, train: Tokens, validation: Tokens, facts: TokenFacts) -> None:
    """Write all files under a temporary name, flush them to the disk, rename the folder."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
    except OSError as error:
        raise _unwritable(place.parent, error) from None
    try:
        np.save(temporary / "train.npy", train)
        np.save(temporary / "validation.npy", validation)
        (temporary / "facts.json").write_text(json.dumps(asdict(facts), indent=1) + "\n")
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary.chmod(0o755)
        temporary.rename(place)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not place.is_dir():  # otherwise another process was faster, with the same content
            raise _unwritable(place, error) from None


def _unwritable(place: Path, error: OSError) -> UserError:
    return UserError(f"the token cache {place} cannot be written ({error.strerror}): set MEGAQAD_CACHE to a folder")
