"""Megatron-Core's GPTModel, cut off before the logits.

The losses of this project take hidden states and the output head, never logits (a [tokens, vocabulary] tensor is the
largest of the whole step). So the model ends after its final norm and hands out its head on request.

The vocabulary is padded only to a multiple of the tensor-parallel size, because Megatron's vocabulary-parallel
layers want equal parts. ``head_weight`` cuts the padding off again: no loss needs a mask for rows that do not exist,
and with them gone the padded rows get no gradient.
"""

from typing import Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaqad.models.description import ModelDescription
from megaqad.models.modules import rotary_frequencies


def vocab_shard(vocab_size: int, rank: int, size: int) -> tuple[int, int, int]:
    """Tensor-parallel ``rank``'s share of a vocabulary: (first row, real rows, rows with padding)."""
    rows = -(-vocab_size // size)
    start = min(rank * rows, vocab_size)
    return start, min(rows, vocab_size - start), rows


class Head(Protocol):
    """What stands between the model and its output head; ``quantization.head.HeadQuantizer`` is one."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """The last hidden states [s(/tp), b, h] as the head sees them."""

    def head(self, weight: Tensor) -> Tensor:
        """The head [real rows, h] as the hidden states are multiplied with it."""


class CausalLM(GPTModel):
    """One pipeline chunk of a decoder-only language model, without the last matrix product.

    Sharding: parameters by Megatron's column, row and vocabulary rules over ``groups.tp``; layers over ``groups.pp``
    and ``vp_stage``. ``pre_process`` chunks hold the embedding, ``post_process`` chunks the final norm and the head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layers: TransformerBlockSubmodules,
        description: ModelDescription,
        *,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        start, real, rows = vocab_shard(description.vocab_size, groups.tp.rank(), groups.tp.size())
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=rows * groups.tp.size(),
            max_sequence_length=description.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=description.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=description.rope_theta,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb.inv_freq = rotary_frequencies(description).to(torch.cuda.current_device())
        self.vocab_start: int = start
        """Vocabulary index of the head's first row on this rank."""
        self._real_vocab_rows = real
        self.head_quantizer: Head | None = None
        """Rounds hidden states and head for the last product; only on ``post_process`` chunks, and not always."""

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states of this chunk.

        Args:
            tokens: int64 [b, s], the same on every tensor-parallel rank; later stages use only its length.
            position_ids: must be None or count from 0; the rotary embedding does.

        Returns:
            After the final norm on the last chunk, what the next chunk receives elsewhere: [s, b, h], or
            [s / tp, b, h] under sequence parallelism. Collectives: those of Megatron's parallel layers.
        """
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
            # A frozen embedding: recomputation gives gradients only to what an input with gradient goes through, and a
            # stage with nothing to train must still have an output that the schedule can go backward from.
            hidden.requires_grad_()
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary_pos_emb(tokens.shape[1])
        )
        return hidden if self.head_quantizer is None else self.head_quantizer(hidden)

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head [real rows, h], rounded if the recipe says so; gradients reach the
        parameter.

        The rows cover the vocabulary from ``vocab_start`` on; over the tensor-parallel ranks they are disjoint and
        complete. Only on ``post_process`` chunks. No collectives.
        """
        rows = self.original_head()
        return rows if self.head_quantizer is None else self.head_quantizer.head(rows)

    def original_head(self) -> Tensor:
        """``head_weight`` without any rounding, a view of the parameter."""
        assert self.post_process, "only the last chunk holds the output head"
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight if self._real_vocab_rows == weight.shape[0] else weight[: self._real_vocab_rows]

    def head_main_grad(self) -> Tensor | None:
        """The rows of Megatron-Core's FP32 main gradient that belong to ``head_weight``, to add to; a view.

        A loss that adds the head's gradient there itself must give autograd none for it. A tied embedding's own
        gradient still comes through autograd and DDP's hook adds it to the same rows. None where nothing accumulates: a
        frozen head, or a model outside DDP.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        main_grad: Tensor | None = vars(weight).get("main_grad")
        return None if main_grad is None or not weight.requires_grad else main_grad[: self._real_vocab_rows]
