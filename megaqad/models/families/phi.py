"""Phi-3 and Phi-4: Llama with q, k, v and gate, up fused in the file, and a share of each head rotated."""

from typing import Any

from megaqad.models.architecture import Architecture
from megaqad.models.families.decoder import attention, decoder, mlp, pre_norm_layer, rotary
from megaqad.models.families.registry import family


@family("Phi3ForCausalLM", "phi3")
def phi3(config: Any, content: dict[str, Any]) -> Architecture:
    rope = rotary(config, partial=True)
    return decoder(
        config,
        content,
        "Phi3ForCausalLM",
        lambda layer: pre_norm_layer(
            config,
            layer,
            attention(config, layer, rope, fused="qkv_proj", window=config.sliding_window),
            mlp(config, layer, fused="gate_up_proj"),
        ),
    )
