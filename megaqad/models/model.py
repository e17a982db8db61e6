"""One model on this rank: what it is, the chunks that this rank holds, and the ranks that hold the rest.

The three travel together through everything: reading and writing, calibration, passes, checkpoints. ``Held`` is how
all of these look at parameters: a weight of the description and the local tensor that it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from megaqad.models.architecture import Architecture
from megaqad.models.causal_lm import CausalLM, DecoderLayer
from megaqad.models.stages import stage_of_layer
from megaqad.models.weights import Weight
from megaqad.runtime.ranks import Ranks


class QuantizerParameter(nn.Parameter):
    """A parameter that no Hugging Face tensor holds as it is: a learned scale of the quantizers."""


@dataclass(frozen=True, eq=False)
class Held:
    """A weight that this rank holds a part of."""

    weight: Weight
    parameter: Tensor
    """A parameter, or a buffer of frozen scales."""
    module: nn.Module
    """What owns the parameter."""
    ranks: tuple[int, int]
    """(rank, ranks) among those that divide it."""

    @property
    def data(self) -> Tensor:
        """This rank's part, without gradient: the parameter, or an expert's slice of it. Asked every time, since DDP
        moves parameters into buffers of its own."""
        return self.slice_of(self.parameter.detach())

    def slice_of(self, like: Tensor) -> Tensor:
        """The part of a tensor that is laid out as the parameter."""
        return like if self.weight.expert is None else like[self.weight.expert % like.shape[0]]


@dataclass(frozen=True, eq=False)
class Model:
    """A model divided among ``ranks``."""

    architecture: Architecture
    chunks: list[CausalLM]
    """This rank's, in the order of the virtual stages; one when the pipeline is not interleaved."""
    ranks: Ranks
    on_change: Callable[["Model"], None] = lambda model: None
    """What must be done whenever weights have changed: quantized copies are made again."""

    def changed(self) -> None:
        """Say that weights have changed; whatever loads or trains them does. Collectives: those of ``on_change``."""
        self.on_change(self)

    @property
    def last(self) -> CausalLM:
        """The chunk that ends the model on the last stage."""
        return self.chunks[-1]

    @property
    def layers(self) -> dict[int, DecoderLayer]:
        """The layers on this rank by their index in the model."""
        return {layer.index: layer for chunk in self.chunks for layer in chunk.decoder_layers}

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.chunks[0].config.params_dtype
        return dtype

    @cached_property
    def held(self) -> tuple[Held, ...]:
        """Every weight that this rank holds a part of, in checkpoint order.

        Raises:
            AssertionError: a chunk has a parameter that no weight of the description names.
        """
        return tuple(held for chunk in self.chunks for held in self._held_by(chunk))

    def _held_by(self, chunk: CausalLM) -> Iterator[Held]:
        prefixes = {layer.index: f"layers.{place}." for place, layer in enumerate(chunk.decoder_layers)}
        modules = dict(chunk.named_modules())
        parameters = dict(chunk.named_parameters())
        unnamed = {name for name, one in parameters.items() if not isinstance(one, QuantizerParameter)}
        for weight in self.architecture.weights:
            if weight.layer is not None and weight.layer not in prefixes:
                continue
            name = weight.name if weight.layer is None else prefixes[weight.layer] + weight.name
            here = weight.expert is None or self.expert_rank_of(weight) == self.ranks.expert_rank
            if name in parameters and here:
                unnamed.discard(name)
                module = modules[name.rpartition(".")[0]]
                yield Held(weight, parameters[name], module, (self.ranks.tensor_rank, self.ranks.sizes.tensor))
        assert not unnamed, f"no weight of {self.architecture.family} names {sorted(unnamed)}"

    def stage_of(self, weight: Weight) -> int:
        """The pipeline rank that holds a weight."""
        if weight.layer is None:
            return self.ranks.sizes.pipeline - 1 if weight.after_layers else 0
        return stage_of_layer(self.architecture.num_layers, self.ranks.sizes)[weight.layer]

    def expert_rank_of(self, weight: Weight) -> int:
        """The expert-parallel rank that holds a weight, the first for what all of them hold."""
        return 0 if weight.expert is None else weight.expert * self.ranks.sizes.expert // weight.experts

    def train(self, mode: bool = True) -> "Model":
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    def freeze(self) -> "Model":
        """Nothing trains; forward as in evaluation."""
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        return self.train(False)
