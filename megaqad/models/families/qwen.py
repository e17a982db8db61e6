"""Qwen2 (biases at q, k, v), Qwen3 (a norm of every query and key head), and both with experts."""

from dataclasses import replace
from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.blocks.attention import Attention
from megaqad.models.blocks.block import Block
from megaqad.models.blocks.rotary import Rotary
from megaqad.models.families.decoder import (
    attention,
    decoder,
    experts,
    head_dim,
    mlp,
    norm,
    pre_norm_layer,
    rotary,
    windows,
)
from megaqad.models.families.registry import family


@family("Qwen2ForCausalLM", "qwen2")
def qwen2(config: Any, content: dict[str, Any]) -> Architecture:
    rope, window = rotary(config), windows(config)
    return decoder(
        config,
        content,
        "Qwen2ForCausalLM",
        lambda layer: pre_norm_layer(
            config, layer, attention(config, layer, rope, qkv_bias=True, window=window[layer]), mlp(config, layer)
        ),
    )


@family("Qwen3ForCausalLM", "qwen3")
def qwen3(config: Any, content: dict[str, Any]) -> Architecture:
    rope, window = rotary(config), windows(config)

    return decoder(
        config,
        content,
        "Qwen3ForCausalLM",
        lambda layer: pre_norm_layer(
            config, layer, _normed_attention(config, layer, rope, window[layer]), mlp(config, layer)
        ),
    )


def _normed_attention(config: Any, layer: int, rope: Rotary, window: int | None) -> Attention:
    prefix, bias = f"model.layers.{layer}.self_attn", config.attention_bias
    return attention(
        config,
        layer,
        rope,
        qkv_bias=bias,
        out_bias=bias,
        window=window,
        query_norm=norm(config, f"{prefix}.q_norm", head_dim(config)),
        key_norm=norm(config, f"{prefix}.k_norm", head_dim(config)),
    )


def _has_experts(config: Any, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


@family("Qwen2MoeForCausalLM", "qwen2_moe")
def qwen2_moe(config: Any, content: dict[str, Any]) -> Architecture:
    rope, window = rotary(config), windows(config)

    def feed_forward(layer: int) -> Block:
        if not _has_experts(config, layer):
            return mlp(config, layer)
        shared = mlp(config, layer, ffn=config.shared_expert_intermediate_size)
        shared = replace(shared, module=f"{shared.module}.shared_expert")
        return experts(config, layer, shared=shared, shared_gate="shared_expert_gate")

    return decoder(
        config,
        content,
        "Qwen2MoeForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(config, layer, rope, qkv_bias=config.qkv_bias, window=window[layer]),
            feed_forward(layer),
        ),
    )


@family("Qwen3MoeForCausalLM", "qwen3_moe")
def qwen3_moe(config: Any, content: dict[str, Any]) -> Architecture:
    rope = rotary(config)
    return decoder(
        config,
        content,
        "Qwen3MoeForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            _normed_attention(config, layer, rope, config.sliding_window),
            experts(config, layer) if _has_experts(config, layer) else mlp(config, layer),
        ),
    )
