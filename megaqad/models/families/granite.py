"""Granite: Llama with four multipliers: of embeddings, attention scores, residual branches and logits."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.families.decoder import attention, decoder, mlp, pre_norm_layer, rotary
from megaqad.models.families.registry import family


@family("GraniteForCausalLM", "granite")
def granite(config: Any, content: dict[str, Any]) -> Architecture:
    rope, bias = rotary(config), config.attention_bias
    return decoder(
        config,
        content,
        "GraniteForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(config, layer, rope, qkv_bias=bias, out_bias=bias, scale=float(config.attention_multiplier)),
            mlp(config, layer, bias=config.mlp_bias),
            multiplier=float(config.residual_multiplier),
        ),
        embedding_multiplier=float(config.embedding_multiplier),
        logits_divisor=float(config.logits_scaling),
    )
