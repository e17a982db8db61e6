"""Before DDP wraps the model: parameters that do not train get no gradient, no moments and no gradient buffer."""

from collections.abc import Sequence

from megaqad.models.model import Model, QuantizerParameter
from megaqad.models.trainable import trains, trains_scales


def freeze(model: Model, patterns: Sequence[str]) -> None:
    """Leave ``requires_grad`` on what ``train.trainable`` names, on this rank. No collectives.

    A pipeline stage may be left with nothing to train; its backward pass still hands gradients on.
    """
    for held in model.held:
        held.parameter.requires_grad_(trains(held.weight, patterns))
        if held.weight.linear:
            for scale in held.module.parameters(recurse=False):
                if isinstance(scale, QuantizerParameter):
                    scale.requires_grad_(trains_scales(held.weight, patterns))
