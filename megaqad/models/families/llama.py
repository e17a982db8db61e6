"""Llama, and Mistral and Ministral, whose attention has sliding windows in some releases."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.blocks.attention import QueryScale
from megaqad.models.families.decoder import attention, decoder, mlp, pre_norm_layer, rotary, windows
from megaqad.models.families.registry import family


@family("LlamaForCausalLM", "llama")
def llama(config: Any, content: dict[str, Any]) -> Architecture:
    rope, bias = rotary(config), config.attention_bias
    return decoder(
        config,
        content,
        "LlamaForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(config, layer, rope, qkv_bias=bias, out_bias=bias),
            mlp(config, layer, bias=config.mlp_bias),
        ),
    )


@family("MistralForCausalLM", "mistral")
def mistral(config: Any, content: dict[str, Any]) -> Architecture:
    rope = rotary(config)
    return decoder(
        config,
        content,
        "MistralForCausalLM",
        lambda layer: pre_norm_layer(
            config, layer, attention(config, layer, rope, window=config.sliding_window), mlp(config, layer)
        ),
    )


@family("MinistralForCausalLM", "ministral")
def ministral(config: Any, content: dict[str, Any]) -> Architecture:
    rope, window = rotary(config), windows(config, needed=True)
    return decoder(
        config,
        content,
        "MinistralForCausalLM",
        lambda layer: pre_norm_layer(
            config, layer, attention(config, layer, rope, window=window[layer]), mlp(config, layer)
        ),
    )


@family("Ministral3ForCausalLM", "ministral3")
def ministral3(config: Any, content: dict[str, Any]) -> Architecture:
    rope, settings = rotary(config), config.rope_parameters
    scale = QueryScale(settings["llama_4_scaling_beta"], settings["original_max_position_embeddings"])
    return decoder(
        config,
        content,
        "Ministral3ForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(config, layer, rope, window=config.sliding_window, query_scale=scale),
            mlp(config, layer),
        ),
    )
