"""From settings to the two datasets of a run: training and held-out.

    prepare_tokens(...)    on one rank, before a barrier: tokenizes when the cache has nothing
    build_datasets(...)    on every rank: maps the cached arrays

The second also works alone; without the first every rank would tokenize at the same time.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megaqad.data.dataset import TokenDataset, mixed_counter
from megaqad.data.settings import DataSettings
from megaqad.data.sources import Split, split_files
from megaqad.data.tokens import TokenArrays, TokenFacts, Tokens, text_tokens
from megaqad.errors import UserError

RANDOM_TRAIN_TOKENS = 1 << 20
RANDOM_VALIDATION_TOKENS = 1 << 16


@dataclass(frozen=True)
class Datasets:
    """The data of a run. facts: files, bytes and tokens of each side, before any `max_*_tokens`. left_out: files of its
    directories that are not read."""

    train: TokenDataset
    validation: TokenDataset
    facts: TokenFacts
    left_out: tuple[Path, ...] = ()


def prepare_tokens(settings: DataSettings, *, model_dir: Path) -> None:
    """Fill the token cache for `settings`; call it on one rank per machine before the others read.

    Errors: every `UserError` that the text, the tokenizer or the split can give.
    """
    split = split_files(settings)
    if split.train or split.held_out:
        text_tokens(split, model_dir)


def build_datasets(settings: DataSettings, *, model_dir: Path, sequence_length: int, seed: int) -> Datasets:
    """Both datasets for the model in `model_dir` (its tokenizer, and its vocabulary from config.json).

    No collectives. Errors: `UserError` for text, tokenizer and split as in `prepare_tokens`, for fewer tokens than one
    sequence, and for tokens that the model's vocabulary does not have.
    """
    vocabulary = vocabulary_size(model_dir)
    split = split_files(settings)
    arrays = _arrays(split, settings, model_dir, vocabulary, seed)
    if arrays.facts.largest_token >= vocabulary:
        raise UserError(
            f"the tokenizer in {model_dir} gave token {arrays.facts.largest_token}, but config.json has "
            f"vocab_size={vocabulary}: the tokenizer belongs to another model, copy the model's own"
        )

    def dataset(tokens: Tokens, most: int, name: str) -> TokenDataset:
        kept = torch.from_numpy(tokens[:most] if most else tokens)
        return TokenDataset(
            kept, sequence_length=sequence_length, seed=seed, origin=f"{arrays.fingerprint} {name}", name=name
        )

    train = dataset(arrays.train, settings.max_train_tokens, "training")
    if len(train) == 0:
        raise UserError(
            f"the training data has {len(train.tokens)} tokens, fewer than one sequence needs ({sequence_length} + 1): "
            "give more text or lower train.sequence_length"
        )
    # one more than asked for: the first token has no prediction
    most = settings.max_validation_tokens + 1 if settings.max_validation_tokens else 0
    return Datasets(train, dataset(arrays.validation, most, "held-out"), arrays.facts, split.left_out)


def vocabulary_size(model_dir: Path) -> int:
    """`vocab_size` of a Hugging Face config.json. Errors: `UserError` when there is none."""
    path = model_dir / "config.json"
    try:
        size = json.loads(path.read_text(encoding="utf-8"))["vocab_size"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: model must be a Hugging Face folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path} has no vocab_size: model must be a Hugging Face folder") from None
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path} has vocab_size={size}: it must be a positive number")
    return size


def _arrays(split: Split, settings: DataSettings, model_dir: Path, vocabulary: int, seed: int) -> TokenArrays:
    if settings.source != "random":
        return text_tokens(split, model_dir)
    train = _random_tokens(f"train {seed}", settings.max_train_tokens or RANDOM_TRAIN_TOKENS, vocabulary)
    if split.held_out:
        held_out = text_tokens(split, model_dir)
        facts = replace(held_out.facts, train_tokens=len(train))
        return TokenArrays(train, held_out.validation, f"random {held_out.fingerprint}", facts)
    count = settings.max_validation_tokens + 1 if settings.max_validation_tokens else RANDOM_VALIDATION_TOKENS
    validation = _random_tokens(f"held-out {seed}", count, vocabulary)
    facts = TokenFacts(len(train), 0, 0, count, 0, 0, vocabulary - 1, "")
    return TokenArrays(train, validation, "random", facts)


def _random_tokens(key: str, count: int, vocabulary: int) -> Tokens:
    return (mixed_counter(f"random tokens {key}", count) % np.uint64(vocabulary)).astype(np.int32)
