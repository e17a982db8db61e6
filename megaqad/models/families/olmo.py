"""OLMo 2: norms after the blocks, none before, and one over all query heads and one over all key heads together."""

from dataclasses import replace
from functools import partial
from typing import Any

from megaqad.models.architecture import Architecture, Layer, Residual
from megaqad.models.families.decoder import attention, decoder, head_dim, mlp, norm, rotary
from megaqad.models.families.registry import family
from megaqad.models.weights import Cut

weight_first = partial(norm, order="weight_first")


@family("Olmo2ForCausalLM", "olmo2")
def olmo2(config: Any, content: dict[str, Any]) -> Architecture:
    rope, bias, dim = replace(rotary(config), wide=True), config.attention_bias, head_dim(config)

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        mixer = attention(
            config,
            index,
            rope,
            qkv_bias=bias,
            out_bias=bias,
            query_norm=weight_first(config, f"{prefix}.self_attn.q_norm", heads * dim, cut=Cut(0, units=heads)),
            key_norm=weight_first(config, f"{prefix}.self_attn.k_norm", groups * dim, cut=Cut(0, units=groups)),
        )
        norm_after = weight_first(config, f"{prefix}.post_attention_layernorm")
        mlp_norm_after = weight_first(config, f"{prefix}.post_feedforward_layernorm")
        return Layer(
            index,
            (
                Residual("self_attention", mixer, norm_after=norm_after),
                Residual("mlp", mlp(config, index), norm_after=mlp_norm_after),
            ),
        )

    return decoder(config, content, "Olmo2ForCausalLM", layer, final_norm=weight_first(config, "model.norm"))
