"""Everything about a checkpoint and its division that can be refused before any weight is read.

``check_checkpoint`` compares the files with config.json, ``check_layout`` the model with the parallel sizes,
``check_sequence_length`` the run's sequences with the model's window. Each raises ``UserError`` with one line that
names the value, the limit and the way out. No torch here.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megaqad.errors import UserError
from megaqad.models.checkpoint_files import TensorEntry, read_headers
from megaqad.models.description import ModelDescription
from megaqad.models.rows import hf_tensors

if TYPE_CHECKING:
    from megaqad.runtime.parallel import ParallelSizes

READABLE_DTYPES = ("BF16", "F16", "F32")


def check_checkpoint(description: ModelDescription, model_dir: Path) -> None:
    """Compare the files in ``model_dir`` with what ``description`` says must be there, headers only.

    Raises:
        UserError: missing or extra tensors, a wrong shape or vocabulary size, an unreadable dtype or a truncated
            file.
    """
    found = read_headers(Path(model_dir))
    expected = hf_tensors(description)
    ignored = description.table.ignored_suffixes
    extra = [name for name in found if name not in expected and not name.endswith(ignored)]
    if description.tied_embeddings and "lm_head.weight" in extra:
        _check_redundant_head(found, model_dir)
        extra.remove("lm_head.weight")
    missing = [name for name in expected if name not in found]
    if missing:
        hint = (
            "; set tie_word_embeddings=true if the head shares the embedding" if missing == ["lm_head.weight"] else ""
        )
        raise UserError(f"{model_dir} lacks {_some(missing)}; complete the checkpoint or correct config.json{hint}")
    if extra:
        raise UserError(
            f"{model_dir} holds {_some(extra)} that {description.table.architecture} does not know; "
            "choose the checkpoint that config.json describes"
        )
    for name, shape in expected.items():
        _check_tensor(description, found[name], name, shape)


def _some(names: list[str], show: int = 3) -> str:
    """The first few names and how many more there are."""
    rest = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + rest


def _check_tensor(description: ModelDescription, entry: TensorEntry, name: str, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        if shape[0] == description.vocab_size and entry.shape[1:] == shape[1:]:
            raise UserError(
                f"{entry.file}: {name} has {entry.shape[0]} rows but config.json says "
                f"vocab_size={description.vocab_size}; correct vocab_size or take the matching weights"
            )
        raise UserError(
            f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}; "
            "take the config.json that belongs to these weights"
        )
    if entry.dtype not in READABLE_DTYPES:
        raise UserError(
            f"{entry.file}: {name} is stored as {entry.dtype}, readable are {', '.join(READABLE_DTYPES)}; "
            "give the unquantized checkpoint"
        )


def _check_redundant_head(found: dict[str, TensorEntry], model_dir: Path) -> None:
    """A tied checkpoint may repeat the embedding as lm_head.weight; another head would be dropped silently."""
    head, embedding = found["lm_head.weight"], found.get("model.embed_tokens.weight")
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
            f"{model_dir}: config.json ties the head to the embedding but lm_head.weight differs from it; "
            "set tie_word_embeddings=false to use the stored head"
        )


def check_layout(description: ModelDescription, sizes: "ParallelSizes") -> None:
    """Whether the model can be divided by ``sizes``.

    Raises:
        UserError: heads, feed-forward size or layers that do not divide, or an interleaved pipeline of one stage.
    """
    tensor = sizes.tensor
    for name, value in (
        ("num_key_value_heads", description.num_kv_heads),
        ("num_attention_heads", description.num_heads),
        ("hidden_size", description.hidden_size),
        ("intermediate_size", description.ffn_hidden_size),
    ):
        if value % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide {name}={value}; choose one of {_divisors(description)}"
            )
    _check_pipeline(description, sizes)


def _divisors(description: ModelDescription) -> str:
    """The tensor-parallel sizes that fit the model."""
    fitting = [
        str(size)
        for size in range(1, description.num_kv_heads + 1)
        if description.num_kv_heads % size == 0
        and description.hidden_size % size == 0
        and description.num_heads % size == 0
        and description.ffn_hidden_size % size == 0
    ]
    return ", ".join(fitting) or "none (the model cannot be divided)"


def _check_pipeline(description: ModelDescription, sizes: "ParallelSizes") -> None:
    layers, stages, virtual = description.num_layers, sizes.pipeline, sizes.virtual_pipeline
    if layers % stages:
        fitting = [str(size) for size in range(1, layers + 1) if layers % size == 0]
        raise UserError(
            f"parallel.pipeline={stages} does not divide {layers} layers; choose one of {', '.join(fitting)}"
        )
    if virtual > 1 and stages == 1:
        raise UserError(
            f"parallel.virtual_pipeline={virtual} needs more than one pipeline stage; set parallel.pipeline=2 or more, "
            "or parallel.virtual_pipeline=1"
        )
    per_stage = layers // stages
    if per_stage % virtual:
        fitting = [str(size) for size in range(1, per_stage + 1) if per_stage % size == 0]
        raise UserError(
            f"parallel.virtual_pipeline={virtual} does not divide the {per_stage} layers of a stage "
            f"({layers} layers / {stages} stages); choose one of {', '.join(fitting)}"
        )


def check_sequence_length(description: ModelDescription, sequence_length: int, sizes: "ParallelSizes") -> None:
    """Whether sequences of this length mean the same here as in transformers.

    Raises:
        UserError: longer than the model's positions, longer than its sliding window (which is not implemented), or
            not divisible among the tensor-parallel ranks under sequence parallelism.
    """
    window = description.sliding_window
    if window is not None and sequence_length > window:
        raise UserError(
            f"train.sequence_length={sequence_length} is longer than the model's sliding window of {window}, which is "
            f"not implemented; set train.sequence_length={window} or less"
        )
    if sequence_length > description.max_position_embeddings:
        raise UserError(
            f"train.sequence_length={sequence_length} is longer than the model's max_position_embeddings="
            f"{description.max_position_embeddings}; set train.sequence_length to that or less"
        )
    if sizes.sequence and sequence_length % sizes.tensor:
        raise UserError(
            f"parallel.sequence=true divides train.sequence_length={sequence_length} among parallel.tensor="
            f"{sizes.tensor} ranks; make it a multiple"
        )


def check_vocabularies(
    student: ModelDescription, model_dir: Path, teacher: ModelDescription, teacher_dir: Path
) -> None:
    """Whether the two models mean the same by every token id.

    Raises:
        UserError: vocabularies of different sizes, or, where both have a tokenizer.json, different tokens.
    """
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"distill.teacher={teacher_dir} has vocab_size={teacher.vocab_size}, the student {student.vocab_size}: "
            "distillation compares token by token, choose a teacher with the same vocabulary"
        )
    ours, theirs = _token_ids(model_dir), _token_ids(teacher_dir)
    if ours is not None and theirs is not None and ours != theirs:
        token = next(token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token))
        raise UserError(
            f"distill.teacher={teacher_dir} has another vocabulary: token {token!r} is {theirs.get(token)} there and "
            f"{ours.get(token)} for the student; choose a teacher with the same tokenizer"
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
