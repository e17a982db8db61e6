"""Before DDP wraps the model: parameters that do not train get no gradient, no moments and no gradient buffer."""

from collections.abc import Sequence

from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.modules import QuantizerParameter
from megaqad.models.sharding import local_parameters
from megaqad.models.trainable import trains, trains_scales


def freeze(chunks: Sequence[CausalLM], description: ModelDescription, patterns: Sequence[str]) -> None:
    """Leave ``requires_grad`` on what ``train.trainable`` names, on this rank. No collectives.

    A pipeline stage may be left with nothing to train; its backward pass still hands gradients on.
    """
    for chunk in chunks:
        modules = dict(chunk.named_modules())
        names = {id(parameter): name for name, parameter in chunk.named_parameters()}
        for placed, parameter in local_parameters(chunk, description):
            parameter.requires_grad_(trains(placed, patterns))
            if placed.row.role is None:
                continue
            layer = modules[names[id(parameter)].rpartition(".")[0]]
            for scale in layer.parameters(recurse=False):
                if isinstance(scale, QuantizerParameter):
                    scale.requires_grad_(trains_scales(placed, patterns))
