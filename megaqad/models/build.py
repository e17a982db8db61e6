"""From a description to Megatron-Core chunks: configuration, layer specs, one ``CausalLM`` per virtual stage.

Read top to bottom: ``transformer_config`` says how the model computes and is divided, ``layer_spec`` what a layer is
made of, ``build_model`` puts the layers of this rank together. Weights are not initialised unless asked for, because
``hf_reader.load_weights`` overwrites every one of them.
"""

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.models.modules import CausalAttention, RMSNorm
from megaqad.models.rows import LinearSite, linear_sites
from megaqad.models.sharding import local_parameters
from megaqad.runtime.parallel import ParallelContext, ParallelSizes

LinearChoice = Callable[[LinearSite], type | ModuleSpec]
"""Picks the module of one linear layer; it is built with the arguments of Megatron's parallel linear layers."""


def transformer_config(
    description: ModelDescription,
    sizes: ParallelSizes,
    *,
    dtype: torch.dtype,
    recompute: bool = False,
    initialize: bool = False,
) -> TransformerConfig:
    """Megatron-Core's configuration of the model.

    Args:
        description: the architecture.
        sizes: how it is divided.
        dtype: of parameters and activations, bfloat16 or float32.
        recompute: keep only each layer's input for backward and run the layer again there.
        initialize: draw random weights (Gaussian, the ``initializer_range`` of config.json); otherwise they hold
            whatever the memory held, until they are loaded.
    """
    fused = torch.cuda.is_available()  # the fusions are torch.compile'd: worth it on a GPU, slow to start on a CPU
    std = float(description.config.get("initializer_range", 0.02))
    return TransformerConfig(
        num_layers=description.num_layers,
        hidden_size=description.hidden_size,
        ffn_hidden_size=description.ffn_hidden_size,
        num_attention_heads=description.num_heads,
        num_query_groups=description.num_kv_heads,
        kv_channels=description.head_dim,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        normalization="RMSNorm",
        layernorm_epsilon=description.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=description.qkv_bias,
        qk_layernorm=description.qk_norm,
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
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        # Freed while the send is in flight: safe with a GPU's stream-ordered allocator, corrupt data with gloo.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        perform_initialization=initialize,
        init_method_std=std,
        transformer_impl="local",
    )


def megatron_linear(site: LinearSite) -> type:
    """The plain choice for every site."""
    return ColumnParallelLinear if site.parallel == "column" else RowParallelLinear


def layer_spec(
    description: ModelDescription,
    layer: int,
    linear_for: LinearChoice,
    attention_core: type | ModuleSpec = CausalAttention,
) -> ModuleSpec:
    """What layer ``layer`` (global index) is made of."""
    linear = {role: linear_for(site) for role, site in linear_sites(description, layer).items()}
    head_norm = RMSNorm if description.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear["qkv"],
            core_attention=attention_core,
            linear_proj=linear["proj"],
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linear["fc1"], linear_fc2=linear["fc2"]))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def chunk_layers(config: TransformerConfig, pipeline_rank: int, vp_stage: int | None) -> range:
    """Global indices of the layers in one chunk."""
    first = get_transformer_layer_offset(config, vp_stage, pipeline_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage, pipeline_rank))


def build_model(
    description: ModelDescription,
    config: TransformerConfig,
    context: ParallelContext,
    *,
    linear_for: LinearChoice | None = None,
    attention_core: type | ModuleSpec = CausalAttention,
    prepare: Callable[[CausalLM], None] = lambda chunk: None,
) -> list[CausalLM]:
    """This rank's chunks, in the order of the virtual stages; one when the pipeline is not interleaved.

    Args:
        description: the architecture.
        config: from ``transformer_config``.
        context: this rank's place and groups.
        linear_for: the module for each linear layer, Megatron's own by default.
        attention_core: softmax attention itself, between the projections.
        prepare: called with every chunk once it stands, to add what a recipe wants.

    Collectives: with tied embeddings and more than one stage, one all-reduce over the embedding group (Megatron's
    way of starting both copies equal).
    """
    virtual = context.sizes.virtual_pipeline
    chunks = []
    for stage in range(virtual):
        vp_stage = stage if virtual > 1 else None
        layers = TransformerBlockSubmodules(
            layer_specs=[
                layer_spec(description, layer, linear_for or megatron_linear, attention_core)
                for layer in chunk_layers(config, context.pipeline_rank, vp_stage)
            ],
            layer_norm=RMSNorm,
        )
        chunk = CausalLM(
            config,
            layers,
            description,
            groups=context.groups,
            pre_process=context.is_first_stage and stage == 0,
            post_process=context.is_last_stage and stage == virtual - 1,
            vp_stage=vp_stage,
        )
        _mark_shards(chunk, description)
        prepare(chunk)
        chunks.append(chunk)
    return chunks


def _mark_shards(chunk: CausalLM, description: ModelDescription) -> None:
    """Tell Megatron which parameters are shards, not copies.

    Its gradient norm counts a copy on the first tensor-parallel rank only. Megatron marks weights while it initialises
    them; without initialisation the shards of the other ranks would be missing from the norm, and clipping off.
    """
    for placed, parameter in local_parameters(chunk, description):
        if placed.row.shard.dim is not None and "tensor_model_parallel" not in vars(parameter):
            set_tensor_model_parallel_attributes(parameter, True, placed.row.shard.dim, 1)


@torch.no_grad()
def copy_model(
    chunks: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    linear_for: LinearChoice | None = None,
    attention_core: type | ModuleSpec = CausalAttention,
    prepare: Callable[[CausalLM], None] = lambda chunk: None,
) -> list[CausalLM]:
    """The same weights in a model that computes in ``dtype``, for forward passes only.

    A BF16 student rounds every activation, and NVFP4 turns a last-bit difference into another code; whoever compares
    it with FP32 logits compares the rounding. Its FP32 copy computes the same function without it.

    Args:
        chunks: this rank's chunks, in any dtype.
        context: the layout they were built for.
        dtype: of the copy's parameters and activations.
        linear_for, attention_core, prepare: as in ``build_model``; must give the same parameters and buffers.

    Collectives: those of ``build_model``.
    """
    copies = build_model(
        description,
        transformer_config(description, context.sizes, dtype=dtype),
        context,
        linear_for=linear_for,
        attention_core=attention_core,
        prepare=prepare,
    )
    for chunk, copy in zip(chunks, copies, strict=True):
        sources = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
        targets = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
        assert sources.keys() == targets.keys(), f"{sorted(sources.keys() ^ targets.keys())} differ between the models"
        for name, target in targets.items():
            target.copy_(sources[name])
            target.requires_grad_(False)
    return copies
