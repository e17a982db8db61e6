"""Which parameters train: patterns on Hugging Face names, resolved against the weights of a model.

A shell-style pattern is matched against the full names of tensors (``model.layers.3.self_attn.q_proj.weight``) and of
the modules that own them. Learned scales of a module are called ``<module>.weight_scale``; the word ``scales`` means
all of them. What Megatron-Core holds as one parameter (q/k/v, gate/up) trains or is frozen
together; so do the experts that one parameter stacks.
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.weights import HfTensor, Weight

ALL_SCALES = "scales"


def trains(weight: Weight, patterns: Sequence[str]) -> bool:
    """Whether the weight is trained.

    Raises:
        UserError: the patterns choose some of the tensors that it holds and not others.
    """
    chosen = [part for part in weight.parts if any(_names(part, pattern) for pattern in patterns)]
    if chosen and len(chosen) != len(weight.parts):
        rest = next(part for part in weight.parts if part not in chosen)
        raise UserError(
            f"train.trainable chooses {chosen[0].name} but not {rest.name}; they are one parameter, so choose both or "
            "neither"
        )
    return bool(chosen)


def trains_scales(weight: Weight, patterns: Sequence[str]) -> bool:
    """Whether the learned scales of this weight are trained."""
    return any(pattern == ALL_SCALES or fnmatchcase(scale_name(weight.parts[0]), pattern) for pattern in patterns)


def scale_name(part: HfTensor) -> str:
    """What patterns call the learned scales of a module."""
    return f"{part.module}.weight_scale"


def trained_share(architecture: Architecture, patterns: Sequence[str]) -> float:
    """How much of the model's weights is trained, 0 to 1, by their number; learned scales are not counted."""
    sizes = [(weight.numel, trains(weight, patterns)) for weight in architecture.stored_weights]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def check_trainable(architecture: Architecture, patterns: Sequence[str], learned: Collection[str]) -> None:
    """Look at the patterns before any weight is read.

    Args:
        learned: Hugging Face modules whose scales are learned.

    Raises:
        UserError: no pattern, one that matches nothing, or one that splits a parameter.
    """
    weights = architecture.weights
    if not patterns:
        raise UserError("train.trainable=[] trains nothing: name what to train, like ['*']")
    scaled = [weight for weight in weights if weight.linear and weight.parts[0].module in learned]
    for pattern in patterns:
        matched = any(_names(part, pattern) for weight in weights for part in weight.parts)
        if not matched and not any(trains_scales(weight, [pattern]) for weight in scaled):
            hint = (
                "no scales are learned: set quantization.weight_scales=learned"
                if pattern == ALL_SCALES
                else f"tensors are named like {weights[0].parts[0].name!r} and {weights[1].parts[0].name!r}"
            )
            raise UserError(f"train.trainable pattern {pattern!r} matches no parameter of this model; {hint}")
    together: dict[tuple[int | None, str], tuple[bool, Weight]] = {}
    for weight in weights:
        chosen, first = together.setdefault((weight.layer, weight.name), (trains(weight, patterns), weight))
        if trains(weight, patterns) != chosen:
            raise UserError(
                f"train.trainable treats {first.parts[0].name} and {weight.parts[0].name} differently; a layer's "
                "experts are one parameter, so choose all of them or none"
            )


def _names(part: HfTensor, pattern: str) -> bool:
    return fnmatchcase(part.name, pattern) or fnmatchcase(part.module, pattern)
