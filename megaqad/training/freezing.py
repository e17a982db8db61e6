"""Before DDP wraps the model: parameters that do not train get no gradient, no moments and no gradient buffer."""

from collections.abc import Sequence

from megaqad.models.blocks.experts import MixtureOfExperts
from megaqad.models.model import Model, QuantizerParameter
from megaqad.models.trainable import trains, trains_scales


def freeze(model: Model, patterns: Sequence[str], *, routers: bool = False) -> None:
    """Leave ``requires_grad`` on what ``train.trainable`` names, on this rank; on routers only with ``routers``. No
    collectives.

    A pipeline stage may be left with nothing to train; its backward pass still hands gradients on.
    """
    kept = set() if routers else set(model.architecture.router_modules)
    for held in model.held:
        frozen = held.weight.parts[0].module in kept
        held.parameter.requires_grad_(not frozen and trains(held.weight, patterns))
        if held.weight.linear:
            for scale in held.module.parameters(recurse=False):
                if isinstance(scale, QuantizerParameter):
                    scale.requires_grad_(trains_scales(held.weight, patterns))


def balance_experts(model: Model, weight: float) -> None:
    """Have the experts of this rank add ``weight`` times the balancing loss in training."""
    for chunk in model.chunks:
        for module in chunk.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance = weight
