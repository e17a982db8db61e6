"""Which parameters train: patterns on Hugging Face names, resolved against the rows of a model.

A shell-style pattern is matched against the full names of tensors (``model.layers.3.self_attn.q_proj.weight``) and of
the modules that own them. Learned scales of a module are called ``<module>.weight_scale``; the word ``scales`` means
all of them. What Megatron-Core holds as one parameter (q/k/v, gate/up) trains or rests together. No torch here.
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from math import prod

from megaqad.errors import UserError
from megaqad.models.description import ModelDescription
from megaqad.models.families import HfTensor
from megaqad.models.rows import PlacedRow, placed_rows

ALL_SCALES = "scales"


def trains(placed: PlacedRow, patterns: Sequence[str]) -> bool:
    """Whether the parameter of this row is trained.

    Raises:
        UserError: the patterns choose some of the tensors that it holds and not others.
    """
    chosen = [part for part in placed.parts if any(_names(part, pattern) for pattern in patterns)]
    if chosen and len(chosen) != len(placed.parts):
        rest = next(part for part in placed.parts if part not in chosen)
        raise UserError(
            f"train.trainable chooses {chosen[0].name} but not {rest.name}; they are one parameter, so choose both or "
            "neither"
        )
    return bool(chosen)


def trains_scales(placed: PlacedRow, patterns: Sequence[str]) -> bool:
    """Whether the learned scales of this row's weight are trained."""
    return any(pattern == ALL_SCALES or fnmatchcase(scale_name(placed.parts[0]), pattern) for pattern in patterns)


def scale_name(part: HfTensor) -> str:
    """What patterns call the learned scales of a module."""
    return f"{part.module}.weight_scale"


def trained_share(description: ModelDescription, patterns: Sequence[str]) -> float:
    """How much of the model's weights is trained, 0 to 1, by their number; learned scales are not counted."""
    dims = description.dims
    sizes = [
        (sum(prod(part.sizes(dims)) for part in placed.parts), trains(placed, patterns))
        for placed in placed_rows(description)
        if not placed.row.alias
    ]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def check_trainable(description: ModelDescription, patterns: Sequence[str], learned: Collection[str]) -> None:
    """Look at the patterns before any weight is read.

    Args:
        learned: Hugging Face modules whose scales are learned.

    Raises:
        UserError: no pattern, one that matches nothing, or one that splits a parameter.
    """
    rows = placed_rows(description)
    if not patterns:
        raise UserError("train.trainable=[] trains nothing: name what to train, like ['*']")
    scaled = [placed for placed in rows if placed.row.role is not None and placed.parts[0].module in learned]
    for pattern in patterns:
        weights = any(_names(part, pattern) for placed in rows for part in placed.parts)
        if not weights and not any(trains_scales(placed, [pattern]) for placed in scaled):
            hint = (
                "no scales are learned: set quantization.weight_scales=learned"
                if pattern == ALL_SCALES
                else f"tensors are named like {rows[0].parts[0].name!r} and {rows[1].parts[0].name!r}"
            )
            raise UserError(f"train.trainable pattern {pattern!r} matches no parameter of this model; {hint}")
    for placed in rows:
        trains(placed, patterns)


def _names(part: HfTensor, pattern: str) -> bool:
    return fnmatchcase(part.name, pattern) or fnmatchcase(part.module, pattern)
