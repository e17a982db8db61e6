"""Mixtral: Mistral's attention, experts in place of the MLP."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.families.decoder import attention, decoder, experts, pre_norm_layer, rotary
from megaqad.models.families.registry import family


@family("MixtralForCausalLM", "mixtral")
def mixtral(config: Any, content: dict[str, Any]) -> Architecture:
    rope = rotary(config)

    def feed_forward(layer: int) -> Any:
        return experts(
            config,
            layer,
            module=f"model.layers.{layer}.block_sparse_moe",
            ffn=config.intermediate_size,
            count=config.num_local_experts,
            normalize=True,
            gate="w1",
            up="w3",
            down="w2",
        )

    return decoder(
        config,
        content,
        "MixtralForCausalLM",
        lambda layer: pre_norm_layer(
            config, layer, attention(config, layer, rope, window=config.sliding_window), feed_forward(layer)
        ),
    )
