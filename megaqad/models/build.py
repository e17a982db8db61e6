"""From a description to a model: Megatron-Core's configuration, and one ``CausalLM`` per virtual stage.

Read top to bottom: ``transformer_config`` says how the model computes and is divided, ``build_model`` puts the layers
of this rank together. Weights are not initialised unless asked for, because ``load.load_weights`` overwrites every one.
"""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from megaqad.models.architecture import Architecture
from megaqad.models.blocks.block import Builder, Choices
from megaqad.models.blocks.plain import PlainChoices
from megaqad.models.causal_lm import CausalLM, Head
from megaqad.models.model import Model
from megaqad.models.operations import operations
from megaqad.models.stages import chunk_layers
from megaqad.runtime.ranks import Ranks
from megaqad.runtime.sizes import ParallelSizes

HeadChoice = Callable[[CausalLM], Head | None]


def transformer_config(
    architecture: Architecture,
    sizes: ParallelSizes,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    initialize: bool = False,
) -> TransformerConfig:
    """What Megatron-Core's parallel layers, schedules, DDP and optimizer must know; the blocks know their own sizes.

    Args:
        architecture: the model.
        sizes: how it is divided.
        dtype: of parameters and activations, bfloat16 or float32.
        recompute: keep only each layer's input for backward and run the layer again there.
        initialize: draw random weights (Gaussian, the ``initializer_range`` of config.json); otherwise they hold
            whatever the memory held, until they are loaded.
    """
    head_norms = (block.query_norm for block in architecture.attentions)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=sizes.tensor,  # asked to divide by the ranks; attention has its own
        add_bias_linear=False,
        # Gradients of the norms of single heads are summed over the tensor-parallel ranks, which hold different heads.
        qk_layernorm=any(norm is not None and norm.cut.dim is None for norm in head_norms),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        sequence_parallel=sizes.sequence and sizes.tensor > 1,
        # An interleaved pipeline of two stages has one peer on both sides: sends in one batch would be matched with the
        # wrong receives, so each direction gets calls (and with two stages a group) of its own.
        overlap_p2p_comm=sizes.virtual_pipeline > 1,
        batch_p2p_comm=sizes.virtual_pipeline == 1,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        # Freed while the send is in flight: safe with a GPU's stream-ordered allocator, corrupt data with gloo.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        perform_initialization=initialize,
        init_method_std=architecture.initializer_range,
        transformer_impl="local",
    )


def build_model(
    architecture: Architecture,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    choices: Choices | None = None,
    head: HeadChoice = lambda chunk: None,
    recompute: bool = False,
    initialize: bool = False,
    fused: str = "auto",
) -> Model:
    """The part of the model that this rank holds, in evaluation mode.

    Args:
        architecture: the model.
        ranks: this rank's place and groups.
        dtype, recompute, initialize: as in ``transformer_config``.
        choices: the modules where a recipe may quantize; Megatron's own by default.
        head: what rounds the head of the chunk that has it, if anything does.
        fused: a member of ``operations.FUSED``.

    Collectives: with tied embeddings and more than one stage, one all-reduce over the embedding group (Megatron's
    way of starting both copies equal).
    """
    config = transformer_config(architecture, ranks.sizes, dtype=dtype, recompute=recompute, initialize=initialize)
    builder = Builder(config, ranks, choices or PlainChoices(), operations(fused, ranks.device))
    virtual = ranks.sizes.virtual_pipeline
    chunks = []
    for stage in range(virtual):
        chunk = CausalLM(
            architecture,
            chunk_layers(architecture.num_layers, ranks.sizes, ranks.pipeline_rank, stage),
            builder,
            pre_process=ranks.is_first_stage and stage == 0,
            post_process=ranks.is_last_stage and stage == virtual - 1,
            vp_stage=stage if virtual > 1 else None,
        )
        if chunk.post_process:
            chunk.head_quantizer = head(chunk)
        chunks.append(chunk)
    model = Model(architecture, chunks, ranks).train(False)
    _mark_shards(model)
    _zero_padding(model)
    return model


def _mark_shards(model: Model) -> None:
    """Tell Megatron which parameters are shards, not copies.

    Its gradient norm counts a copy on the first tensor-parallel rank only. Megatron marks weights while it initialises
    them; without initialisation the shards of the other ranks would be missing from the norm, and clipping off.
    """
    for held in model.held:
        dim = held.weight.parts[0].cut.dim
        if dim is not None and "tensor_model_parallel" not in vars(held.parameter):
            stacked = int(held.weight.expert is not None)
            set_tensor_model_parallel_attributes(held.parameter, True, dim + stacked, 1)


@torch.no_grad()
def _zero_padding(model: Model) -> None:
    """Rows that only fill up the vocabulary are in no file and get no gradient; zero, and never what memory held."""
    tensor, rank = model.ranks.sizes.tensor, model.ranks.tensor_rank
    for held in model.held:
        part = held.weight.parts[0]
        if part.cut.padded:
            start, stop = part.cut.span(part.size[0], rank, tensor)
            held.data[stop - start :].zero_()


@torch.no_grad()
def copy_model(
    model: Model, *, dtype: torch.dtype, choices: Choices | None = None, head: HeadChoice = lambda chunk: None
) -> Model:
    """The same weights in a model that computes in ``dtype``, for forward passes only.

    A BF16 student rounds every activation, and NVFP4 turns a last-bit difference into another code; comparing it with
    FP32 logits would compare the rounding. Its FP32 copy computes the same function without it.

    Args:
        model: in any dtype.
        dtype: of the copy's parameters and activations.
        choices, head: as in ``build_model``; must give the same parameters and buffers.

    Collectives: those of ``build_model``.
    """
    copied = build_model(model.architecture, model.ranks, dtype=dtype, choices=choices, head=head)
    for chunk, copy in zip(model.chunks, copied.chunks, strict=True):
        sources = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
        targets = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
        assert sources.keys() == targets.keys(), f"{sorted(sources.keys() ^ targets.keys())} differ between the models"
        for name, target in targets.items():
            target.copy_(sources[name])
            target.requires_grad_(False)
    return copied
