"""SmolLM3: Llama in which some layers do not rotate queries and keys."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.families.decoder import attention, decoder, mlp, pre_norm_layer, rotary, windows
from megaqad.models.families.registry import family


@family("SmolLM3ForCausalLM", "smollm3")
def smollm3(config: Any, content: dict[str, Any]) -> Architecture:
    rope, window, bias = rotary(config), windows(config), config.attention_bias
    return decoder(
        config,
        content,
        "SmolLM3ForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(
                config,
                layer,
                rope if config.no_rope_layers[layer] else None,  # the list has a 1 for layers that rotate
                qkv_bias=bias,
                out_bias=bias,
                window=window[layer],
            ),
            mlp(config, layer, bias=config.mlp_bias),
        ),
    )
