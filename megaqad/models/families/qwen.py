"""Qwen2 (biases at q, k, v) and Qwen3 (a norm of every query and key head)."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.blocks.attention import Attention
from megaqad.models.families.decoder import attention, decoder, head_dim, mlp, norm, pre_norm_layer, rotary, windows
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

    def mixer(layer: int) -> Attention:
        prefix, bias = f"model.layers.{layer}.self_attn", config.attention_bias
        return attention(
            config,
            layer,
            rope,
            qkv_bias=bias,
            out_bias=bias,
            window=window[layer],
            query_norm=norm(config, f"{prefix}.q_norm", head_dim(config)),
            key_norm=norm(config, f"{prefix}.k_norm", head_dim(config)),
        )

    return decoder(
        config,
        content,
        "Qwen3ForCausalLM",
        lambda layer: pre_norm_layer(config, layer, mixer(layer), mlp(config, layer)),
    )
