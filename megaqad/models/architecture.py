"""What a model is: layers of blocks, with the names and sizes of its checkpoint.

    Architecture   embedding -> layers -> final norm -> head
    Layer          residual branches, one after the other: attention and MLP, or one mixer, or none
    Residual       x + multiplier * norm_after(block(norm_before(x)))

``families`` makes an ``Architecture`` from a config.json; building, reading, writing, quantizing and checking are loops
over it. Sizes are of the whole model, before any sharding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megaqad.models.blocks.attention import Attention
from megaqad.models.blocks.block import Block
from megaqad.models.blocks.norm import Norm
from megaqad.models.weights import VOCABULARY, HfTensor, Weight


@dataclass(frozen=True)
class Residual:
    """One residual branch."""

    name: str
    """Of its module within the layer."""
    block: Block
    norm_before: Norm | None = None
    norm_after: Norm | None = None
    """Of the block's output, before it is added."""
    multiplier: float = 1.0
    """Of what is added."""

    def weights(self) -> Iterator[Weight]:
        """In the order in which checkpoints usually hold them."""
        if self.norm_before is not None:
            yield self.norm_before.weight(f"{self.name}.norm_before")
        for weight in self.block.weights():
            yield replace(weight, name=f"{self.name}.block.{weight.name}")
        if self.norm_after is not None:
            yield self.norm_after.weight(f"{self.name}.norm_after")


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Without branches it is the identity."""

    index: int
    branches: tuple[Residual, ...]

    def weights(self) -> Iterator[Weight]:
        for branch in self.branches:
            for weight in branch.weights():
                yield replace(weight, layer=self.index)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only language model."""

    family: str
    """Name of its class in transformers, as config.json's ``architectures`` gives it."""
    vocab_size: int
    """Rows of the embedding and of the head in the checkpoint."""
    hidden_size: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    tied_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    config: Mapping[str, Any]
    """config.json as it was read; exports write it back."""
    embedding: str
    """Hugging Face name of the token embedding."""
    head: str
    """Hugging Face name of the output head."""
    embedding_multiplier: float = 1.0
    logits_divisor: float = 1.0
    """Logits are divided by it; the last hidden states are here, which is the same function."""
    carried: tuple[str, ...] = ()
    """Prefixes of tensors that the checkpoint may hold besides and this model does not compute with (``mtp.``); they
    are carried over to what is exported."""

    student_vocab_size: int | None = None
    """For the teacher of a student with another number of ids: see ``teaching``."""

    def teaching(self, vocab_size: int) -> "Architecture":
        """This model as the teacher of a student with ``vocab_size`` ids, whose heads are cut at the same ids.

        Only the ids that both have are read and compared: the teacher's distribution is the one given that the next
        token is among them, and so is the student's (rows that pad a vocabulary stand for no token). Any other rule
        would be infinite for some divergence, where one of the two gives no probability at all.
        """
        return self if vocab_size == self.vocab_size else replace(self, student_vocab_size=vocab_size)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every weight in checkpoint order; with a tied head that is an alias of the embedding."""
        table = HfTensor(f"{self.embedding}.weight", (self.vocab_size, self.hidden_size), VOCABULARY)
        if self.student_vocab_size is not None:
            cut = replace(VOCABULARY, least=self.student_vocab_size)
            table = replace(table, cut=cut, rows=(0, min(self.vocab_size, self.student_vocab_size)))
        head = table if self.tied_embeddings else replace(table, name=f"{self.head}.weight")
        return (
            Weight("embedding.word_embeddings.weight", (table,)),
            *(weight for layer in self.layers for weight in layer.weights()),
            replace(self.final_norm.weight("final_norm"), after_layers=True),
            Weight("output_layer.weight", (head,), alias=self.tied_embeddings, after_layers=True),
        )

    @cached_property
    def stored_weights(self) -> tuple[Weight, ...]:
        """The weights that a checkpoint holds."""
        return tuple(weight for weight in self.weights if not weight.alias)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint must have, in checkpoint order."""
        return {part.name: part.shape for weight in self.stored_weights for part in weight.parts}

    @cached_property
    def linears(self) -> tuple[Weight, ...]:
        """Weights of the layers' linear modules, in model order; the head is not among them."""
        return tuple(weight for weight in self.weights if weight.linear)

    @property
    def linear_modules(self) -> list[str]:
        """Their Hugging Face names, the head not among them."""
        return list(dict.fromkeys(module for weight in self.linears for module in weight.modules))

    @property
    def router_modules(self) -> list[str]:
        """Matrices of the layers that no recipe quantizes: routers of experts, gates of shared ones."""
        matrices = (weight for weight in self.weights if weight.layer is not None and not weight.linear)
        return list(dict.fromkeys(w.parts[0].module for w in matrices if len(w.parts[0].shape) == 2))

    @property
    def head_weight(self) -> Weight:
        """The output head as a linear layer."""
        return replace(self.weights[-1], parts=(replace(self.weights[-1].parts[0], name=f"{self.head}.weight"),))

    def flops(self, tokens: int) -> float:
        """Of a forward pass over a sequence of ``tokens``, per token: the matrix products of layers and head."""
        branches = (branch for layer in self.layers for branch in layer.branches)
        return sum(branch.block.flops(tokens) for branch in branches) + 2.0 * self.hidden_size * self.vocab_size

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The softmax attentions, in model order: what has a KV cache."""
        branches = (branch for layer in self.layers for branch in layer.branches)
        return tuple(branch.block for branch in branches if isinstance(branch.block, Attention))
