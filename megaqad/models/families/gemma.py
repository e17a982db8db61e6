"""Gemma 3: norms around every block whose weights are stored less one, and layers of local and of global attention."""

from functools import partial
from typing import Any

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture, Layer, Residual
from megaqad.models.families.decoder import activation, attention, decoder, head_dim, mlp, norm, rotary, windows
from megaqad.models.families.registry import family

CHANGES_THE_FUNCTION = ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
centred = partial(norm, order="centred")


@family("Gemma3ForCausalLM", "gemma3_text")
def gemma3(config: Any, content: dict[str, Any]) -> Architecture:
    for setting in CHANGES_THE_FUNCTION:
        value = config.to_dict()[setting]
        if value is not None and value is not False:
            raise UserError(f"{setting}={value} is not supported; only checkpoints without it can be read")
    window, bias = windows(config, needed=True), config.attention_bias
    # Local layers rotate faster than global ones: each type has settings of its own.
    ropes = {kind: rotary(config, kind) for kind in set(config.layer_types)}

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        mixer = attention(
            config,
            index,
            ropes[config.layer_types[index]],
            qkv_bias=bias,
            out_bias=bias,
            query_norm=centred(config, f"{prefix}.self_attn.q_norm", head_dim(config)),
            key_norm=centred(config, f"{prefix}.self_attn.k_norm", head_dim(config)),
            scale=config.query_pre_attn_scalar**-0.5,
            window=window[index],
        )
        feed_forward = mlp(config, index, activation=activation(config.hidden_activation))
        before, after, before_mlp, after_mlp = (centred(config, f"{prefix}.{name}") for name in NORMS)
        return Layer(
            index,
            (
                Residual("self_attention", mixer, before, after),
                Residual("mlp", feed_forward, before_mlp, after_mlp),
            ),
        )

    return decoder(
        config,
        content,
        "Gemma3ForCausalLM",
        layer,
        final_norm=centred(config, "model.norm"),
        embedding_multiplier=config.hidden_size**0.5,
    )
