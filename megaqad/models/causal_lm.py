"""One pipeline chunk of a decoder-only language model, cut off before the logits.

The losses of this project take hidden states and the output head, never logits (a [tokens, vocabulary] tensor is the
largest of the whole step). So the model ends after its final norm and hands out its head on request.

Megatron-Core brings the embedding, the parallel linear layers and the bookkeeping of tied embeddings; layers are the
blocks of the ``Architecture``, in order. The vocabulary is padded only to a multiple of the tensor-parallel size,
because Megatron's vocabulary-parallel layers want equal parts. ``head_weight`` cuts the padding off again: no loss
needs a mask for rows that do not exist, and with them gone the padded rows get no gradient.
"""

from dataclasses import replace
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from torch import Tensor, nn

from megaqad.models.architecture import Architecture, Layer, Residual
from megaqad.models.blocks.block import Builder
from megaqad.models.blocks.rotary import Tables


class Head(nn.Module):
    """What stands between the model and its output head; ``quantization.head.HeadSite`` is one. Called with the last
    hidden states [s(/tp), b, h] it returns them as the head sees them."""

    def head(self, weight: Tensor) -> Tensor:
        """The head [real rows, h] as the hidden states are multiplied with it."""
        raise NotImplementedError


class ResidualBranch(nn.Module):
    """x + multiplier * norm_after(block(norm_before(x))); sharding as the block's."""

    def __init__(self, branch: Residual, builder: Builder) -> None:
        super().__init__()
        self.norm_before = None if branch.norm_before is None else branch.norm_before.build(builder)
        self.block = branch.block.build(builder.within(branch.name).within("block"))
        self.norm_after = None if branch.norm_after is None else branch.norm_after.build(builder)
        self.multiplier = branch.multiplier

    def forward(self, hidden: Tensor, tables: Tables) -> Tensor:
        inner = hidden if self.norm_before is None else self.norm_before(hidden)
        inner = self.block(inner, tables)
        if self.norm_after is not None:
            inner = self.norm_after(inner)
        if self.multiplier != 1.0:
            inner = inner * self.multiplier
        added: Tensor = hidden + inner
        return added


class DecoderLayer(nn.Module):
    """The branches of one layer, by name."""

    def __init__(self, layer: Layer, builder: Builder) -> None:
        super().__init__()
        self.index = layer.index
        """In the model, from 0."""
        for branch in layer.branches:
            self.add_module(branch.name, ResidualBranch(branch, replace(builder, layer=layer.index)))

    def forward(self, hidden: Tensor, tables: Tables) -> Tensor:
        for branch in self.children():
            hidden = branch(hidden, tables)
        return hidden


class CausalLM(LanguageModule):
    """One pipeline chunk: ``pre_process`` chunks hold the embedding, ``post_process`` chunks final norm and head.

    Sharding: parameters by Megatron's column, row and vocabulary rules over the tensor-parallel group.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: range,
        builder: Builder,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        """``layers``: indices of the layers of this chunk."""
        ranks, config = builder.ranks, builder.config
        super().__init__(config=config, pg_collection=ranks.groups)
        self.model_type = ModelType.encoder_or_decoder  # the schedules ask for it
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = architecture.tied_embeddings
        self.embedding_multiplier = architecture.embedding_multiplier
        self.logits_divisor = architecture.logits_divisor
        self.recompute = config.recompute_granularity == "full"
        tensor = ranks.sizes.tensor
        table = architecture.head_weight.parts[0]
        padded_vocabulary = table.cut.part(table.size[0], tensor) * tensor
        self.vocab_start, stop = table.cut.span(table.size[0], ranks.tensor_rank, tensor)
        """Vocabulary index of the head's first row on this rank."""
        self._real_vocab_rows = stop - self.vocab_start
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocabulary,
                max_sequence_length=architecture.max_position_embeddings,
                position_embedding_type="none",
                tp_group=ranks.tensor_group,
            )
        self.layers = nn.ModuleList(DecoderLayer(architecture.layers[index], builder) for index in layers)
        self.final_norm = architecture.final_norm.build(builder) if post_process else None
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocabulary,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and architecture.tied_embeddings,
                tp_group=ranks.tensor_group,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self._tables = Tables()
        self._received: Tensor | None = None
        self.head_quantizer: Head | None = None
        """Rounds hidden states and head for the last product; only on ``post_process`` chunks, and not always."""

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers of this chunk, in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the schedule received from the chunk before: [s(/tp), b, h]."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states of this chunk.

        Args:
            tokens: int64 [b, s], the same on every tensor-parallel rank; later stages use only its length.

        Returns:
            After the final norm on the last chunk, what the next chunk receives elsewhere: [s, b, h], or
            [s / tp, b, h] under sequence parallelism. Collectives: those of the layers.
        """
        hidden = self._embedded(tokens) if self.pre_process else self._received
        assert hidden is not None, "the schedule hands over what came from the chunk before"
        self._tables.length = tokens.shape[1]
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden = tensor_parallel.checkpoint(partial(layer, tables=self._tables), False, hidden)
            else:
                hidden = layer(hidden, self._tables)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.post_process and self.logits_divisor != 1.0:
            hidden = hidden / self.logits_divisor
        return hidden if self.head_quantizer is None else self.head_quantizer(hidden)

    def _embedded(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids=tokens, position_ids=None)
        if self.embedding_multiplier != 1.0:
            hidden = hidden * torch.tensor(self.embedding_multiplier, dtype=hidden.dtype, device=hidden.device)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # A frozen embedding: recomputation gives gradients only to what an input with gradient goes through, and a
            # stage with nothing to train must still have an output that the schedule can go backward from.
            hidden.requires_grad_()
        return hidden

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head [real rows, h], rounded if the recipe says so; gradients reach the
        parameter.

        The rows cover the vocabulary from ``vocab_start`` on; over the tensor-parallel ranks they are disjoint and
        complete. Only on ``post_process`` chunks. No collectives.
        """
        rows = self.original_head()
        return rows if self.head_quantizer is None else self.head_quantizer.head(rows)

    @property
    def head_parameter(self) -> nn.Parameter:
        """What holds the head, padding included; with a tied head on one stage the embedding's. Only on
        ``post_process`` chunks."""
        assert self.post_process, "only the last chunk holds the output head"
        tied = self.share_embeddings_and_output_weights
        weight: nn.Parameter = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return weight

    def original_head(self) -> Tensor:
        """``head_weight`` without any rounding, a view of the parameter."""
        weight = self.head_parameter
        return weight if self._real_vocab_rows == weight.shape[0] else weight[: self._real_vocab_rows]

    def head_main_grad(self) -> Tensor | None:
        """The rows of Megatron-Core's FP32 main gradient that belong to ``head_weight``, to add to; a view.

        A loss that adds the head's gradient there itself must give autograd none for it. A tied embedding's own
        gradient still comes through autograd and DDP's hook adds it to the same rows. None where nothing accumulates: a
        frozen head, or a model outside DDP.
        """
        weight = self.head_parameter
        main_grad: Tensor | None = vars(weight).get("main_grad")
        return None if main_grad is None or not weight.requires_grad else main_grad[: self._real_vocab_rows]
