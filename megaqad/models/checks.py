"""Everything about a checkpoint and its division that can be refused before any weight is read.

``check_checkpoint`` compares the files with config.json, ``check_layout`` the model with the parallel sizes,
``check_sequence_length`` the run's sequences with the model's positions. Each raises ``UserError`` with one line that
names the value, the limit and the way out.
"""

import json
import re
from pathlib import Path

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.checkpoint_files import TensorEntry
from megaqad.models.encodings import Checkpoint
from megaqad.runtime.sizes import ParallelSizes

READABLE_DTYPES = ("BF16", "F16", "F32")
RECOMPUTED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Endings of tensors that old checkpoints carry and every reader computes again."""


def check_checkpoint(architecture: Architecture, model_dir: Path) -> None:
    """Compare the files in ``model_dir`` with what ``architecture`` says must be there, headers only.

    Raises:
        UserError: missing or extra tensors, a wrong shape or vocabulary size, an unreadable dtype or a truncated
            file.
    """
    checkpoint = Checkpoint(model_dir)
    found = checkpoint.entries
    missing = [name for name in architecture.tensors if checkpoint.shape(name) is None]
    head = f"{architecture.head}.weight"
    if architecture.tied_embeddings and head in found:
        _check_redundant_head(head, found[head], found.get(f"{architecture.embedding}.weight"), model_dir)
    if missing:
        hint = "; set tie_word_embeddings=true if the head shares the embedding" if missing == [head] else ""
        raise UserError(f"{model_dir} lacks {_some(missing)}; complete the checkpoint or correct config.json{hint}")
    for name in architecture.tensors:
        _check_readable(checkpoint, name)
    belonging = [name for name in unused_tensors(architecture, checkpoint) if _belongs(architecture, name)]
    if belonging:
        raise UserError(
            f"{model_dir} holds {_some(belonging)} that {architecture.family} does not know; "
            "choose the checkpoint that config.json describes"
        )
    for name, shape in architecture.tensors.items():
        _check_tensor(architecture, checkpoint, name, shape)


def unused_tensors(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Tensors of a checkpoint that this model does not compute with: heads for several tokens, vision towers."""
    unused = checkpoint.unused_by([*architecture.tensors, f"{architecture.head}.weight"])
    return [name for name in unused if not name.endswith(RECOMPUTED)]


def _belongs(architecture: Architecture, name: str) -> bool:
    """Whether an unknown tensor is of a module, or of the layers, that are computed here: it would change them."""
    modules = {known.rpartition(".")[0] for known in architecture.tensors}
    numbered = (re.match(r"(.*?\.)\d+\.", known) for known in architecture.tensors)
    layers = {match[1] for match in numbered if match is not None}
    return name.rpartition(".")[0] in modules or name.startswith(tuple(layers))


def _some(names: list[str], show: int = 3) -> str:
    """The first few names and how many more there are."""
    rest = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + rest


def _check_tensor(architecture: Architecture, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    found, file = checkpoint.shape(name), checkpoint.file_of(name)
    assert found is not None, "missing tensors are named before"
    if found != shape:
        if shape[0] == architecture.vocab_size and found[1:] == shape[1:]:
            raise UserError(
                f"{file}: {name} has {found[0]} rows but config.json says "
                f"vocab_size={architecture.vocab_size}; correct vocab_size or take the matching weights"
            )
        raise UserError(
            f"{file}: {name} has shape {list(found)}, config.json asks for {list(shape)}; "
            "take the config.json that belongs to these weights"
        )


def _check_readable(checkpoint: Checkpoint, name: str) -> None:
    entry = checkpoint.entries.get(name)
    if entry is not None and checkpoint.encoding(name) is None and entry.dtype not in READABLE_DTYPES:
        raise UserError(
            f"{entry.file}: {name} is stored as {entry.dtype}, readable are {', '.join(READABLE_DTYPES)}, and FP8, "
            "MXFP8, MXFP4 and NVFP4 with the scales of each block; give the unquantized checkpoint"
        )


def _check_redundant_head(name: str, head: TensorEntry, embedding: TensorEntry | None, model_dir: Path) -> None:
    """A tied checkpoint may repeat the embedding as its head; another head would be dropped silently."""
    same = embedding is not None and (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and embedding is not None:
        with head.file.open("rb") as left, embedding.file.open("rb") as right:
            left.seek(head.begin)
            right.seek(embedding.begin)
            remaining = head.end - head.begin
            while same and remaining:
                size = min(remaining, 1 << 24)
                same = left.read(size) == right.read(size)
                remaining -= size
    if not same:
        raise UserError(
            f"{model_dir}: config.json ties the head to the embedding but {name} differs from it; "
            "set tie_word_embeddings=false to use the stored head"
        )


def check_layout(architecture: Architecture, sizes: ParallelSizes) -> None:
    """Whether the model can be divided by ``sizes``.

    Raises:
        UserError: a block that cannot be divided so, fewer layers than chunks, or an interleaved pipeline of one stage.
    """
    tensor, stages, virtual = sizes.tensor, sizes.pipeline, sizes.virtual_pipeline
    if architecture.hidden_size % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide hidden_size={architecture.hidden_size}; choose a divisor"
        )
    for branch in (branch for layer in architecture.layers for branch in layer.branches):
        problem = branch.block.refuse(sizes)
        if problem is not None:
            raise UserError(problem)
    if virtual > 1 and stages == 1:
        raise UserError(
            f"parallel.virtual_pipeline={virtual} needs more than one pipeline stage; set parallel.pipeline=2 or more, "
            "or parallel.virtual_pipeline=1"
        )
    if stages * virtual > architecture.num_layers:
        asked = f"parallel.pipeline={stages}" + (f" x parallel.virtual_pipeline={virtual}" if virtual > 1 else "")
        raise UserError(f"{asked} is more than the model's {architecture.num_layers} layers; choose fewer stages")
    if sizes.expert > 1 and not any(weight.expert is not None for weight in architecture.weights):
        raise UserError(
            f"parallel.expert={sizes.expert} divides experts, and {architecture.family} has none; set parallel.expert=1"
        )


def check_sequence_length(architecture: Architecture, sequence_length: int, sizes: ParallelSizes) -> None:
    """Whether the model has positions for sequences of this length, and ranks can divide them.

    Raises:
        UserError: longer than the model's positions, or not divisible among the tensor-parallel ranks under sequence
            parallelism.
    """
    if sequence_length > architecture.max_position_embeddings:
        raise UserError(
            f"train.sequence_length={sequence_length} is longer than the model's max_position_embeddings="
            f"{architecture.max_position_embeddings}; set train.sequence_length to that or less"
        )
    if sizes.sequence and sequence_length % sizes.tensor:
        raise UserError(
            f"parallel.sequence=true divides train.sequence_length={sequence_length} among parallel.tensor="
            f"{sizes.tensor} ranks; make it a multiple"
        )


def check_vocabularies(student: Architecture, model_dir: Path, teacher: Architecture, teacher_dir: Path) -> None:
    """Whether the two models mean the same by every token id.

    Raises:
        UserError: a token with two ids, or an id with two tokens, in the models' tokenizer.json files. Ids that one
            of them lacks are no reason: they are not compared (``Architecture.teaching``).
    """
    ours, theirs = _token_ids(model_dir), _token_ids(teacher_dir)
    if ours is None or theirs is None:
        if student.vocab_size == teacher.vocab_size:
            return
        raise UserError(
            f"distill.teacher={teacher_dir} has vocab_size={teacher.vocab_size}, the student {student.vocab_size}, "
            "and without a tokenizer.json in both nothing says that their ids mean the same: add the files"
        )
    shared = min(student.vocab_size, teacher.vocab_size)
    names = {number: token for token, number in theirs.items()}
    for token, number in sorted(ours.items()):
        other = names.get(number) if number < shared and token not in theirs else None
        if theirs.get(token, number) != number:
            problem = f"token {token!r} is {theirs[token]} there and {number} for the student"
        elif other is not None:
            problem = f"id {number} is {other!r} there and {token!r} for the student"
        else:
            continue
        raise UserError(
            f"distill.teacher={teacher_dir} has another vocabulary: {problem}; choose a teacher with the same tokenizer"
        )


def _token_ids(model_dir: Path) -> dict[str, int] | None:
    """Every token and its id, from tokenizer.json; None when there is none that lists them."""
    try:
        content = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        listed = (
            vocabulary if isinstance(vocabulary, dict) else {piece: rank for rank, (piece, _) in enumerate(vocabulary)}
        )
        return listed | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # random tokens need no tokenizer; where text needs one, the data say so
