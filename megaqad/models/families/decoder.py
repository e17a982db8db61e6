"""What most decoder families share: the spelling of their settings and of their tensors.

A family's file puts these together and says where it differs. ``config`` is transformers' configuration throughout.
"""

from collections.abc import Callable
from typing import Any

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture, Layer, Residual
from megaqad.models.blocks.attention import Attention
from megaqad.models.blocks.block import Block
from megaqad.models.blocks.experts import Experts
from megaqad.models.blocks.mlp import Mlp, activation_of
from megaqad.models.blocks.norm import Norm, Order
from megaqad.models.blocks.rotary import Rotary
from megaqad.models.weights import WHOLE, Cut


def norm(config: Any, module: str, size: int | None = None, *, order: Order = "cast_first", cut: Cut = WHOLE) -> Norm:
    """RMSNorm ``module`` over the hidden size, or another."""
    return Norm(module, size or config.hidden_size, float(config.rms_norm_eps), order, cut)


def head_dim(config: Any) -> int:
    """Of attention: as it is set, or the hidden size's equal share."""
    given = config.to_dict().get("head_dim")
    if given is None and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads} "
            "and there is no head_dim; add head_dim"
        )
    return int(given or config.hidden_size // config.num_attention_heads)


def rotary(config: Any, layer_type: str | None = None, *, partial: bool = False) -> Rotary:
    """The rotary embedding of all layers, or of those of one type.

    Args:
        partial: whether the family's attention rotates ``partial_rotary_factor`` of a head. In the others transformers
            ignores that setting or fails over it, and engines follow it: refused.
    """
    settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    share = settings.get("partial_rotary_factor") or config.to_dict().get("partial_rotary_factor") or 1.0
    if share != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor={share} has no meaning for {config.model_type}; remove it")
    dim = int(head_dim(config) * share)
    made = Rotary(dim, head_dim(config), settings["rope_theta"], settings["rope_type"], config, layer_type)
    made.check(config.max_position_embeddings)  # also where no layer rotates: transformers makes no such model either
    return made


def windows(config: Any, *, needed: bool = False) -> list[int | None]:
    """The sliding window of every layer, from ``layer_types``; None where a layer sees everything.

    Args:
        needed: whether transformers' class asks for a window even where no layer uses one.
    """
    if needed and config.sliding_window is None:
        raise UserError(f"sliding_window=null: transformers computes no {config.model_type} without a window; set one")
    return [_window_of(config, kind) for kind in config.layer_types]


def _window_of(config: Any, kind: str) -> int | None:
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise UserError(f"layer_types has {kind!r}; only full_attention and sliding_attention are supported")
    if config.sliding_window is None:
        raise UserError("layer_types has sliding_attention without a window; set sliding_window or use full_attention")
    return int(config.sliding_window)


def attention(config: Any, layer: int, rope: Rotary | None, **changes: Any) -> Attention:
    """``model.layers.N.self_attn`` with grouped heads; ``changes`` are fields of ``Attention``."""
    window = changes.get("window")
    if window is not None and window <= 0:  # unused windows may be 0 in the file
        raise UserError(f"sliding_window={window} lets a token see nothing; it must be a positive integer or null")
    return Attention(
        **{
            "module": f"model.layers.{layer}.self_attn",
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "groups": config.num_key_value_heads,
            "head_dim": head_dim(config),
            "rotary": rope,
            **changes,
        }
    )


def mlp(config: Any, layer: int, **changes: Any) -> Mlp:
    """``model.layers.N.mlp`` with a gate; ``changes`` are fields of ``Mlp``."""
    return Mlp(
        **{
            "module": f"model.layers.{layer}.mlp",
            "hidden": config.hidden_size,
            "ffn": config.intermediate_size,
            "activation": changes.get("activation") or activation(config.hidden_act),
            **changes,
        }
    )


def experts(config: Any, layer: int, **changes: Any) -> Experts:
    """``model.layers.N.mlp`` with a router and experts; ``changes`` are fields of ``Experts``."""
    settings = config.to_dict()
    return Experts(
        **{
            "module": f"model.layers.{layer}.mlp",
            "hidden": config.hidden_size,
            "ffn": settings.get("moe_intermediate_size"),
            "count": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "normalize": bool(settings.get("norm_topk_prob")),
            "activation": activation(config.hidden_act),
            **changes,
        }
    )


def activation(name: str) -> str:
    """transformers' ``hidden_act`` by our name."""
    known = activation_of(name)
    if known is None:
        raise UserError(f"hidden_act={name!r} is not supported, only silu, gelu (exact or tanh) and relu2")
    return known


def pre_norm_layer(config: Any, layer: int, mixer: Block, feed_forward: Block, multiplier: float = 1.0) -> Layer:
    """Llama's layer: a norm before attention, one before the MLP."""
    prefix = f"model.layers.{layer}"
    return Layer(
        layer,
        (
            Residual("self_attention", mixer, norm(config, f"{prefix}.input_layernorm"), multiplier=multiplier),
            Residual("mlp", feed_forward, norm(config, f"{prefix}.post_attention_layernorm"), multiplier=multiplier),
        ),
    )


def decoder(
    config: Any, content: dict[str, Any], family: str, layer: Callable[[int], Layer], **changes: Any
) -> Architecture:
    """A model of ``layer(0)``, ``layer(1)``, ..; ``changes`` are fields of ``Architecture``."""
    return Architecture(
        **{
            "family": family,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "layers": tuple(layer(index) for index in range(config.num_hidden_layers)),
            "final_norm": norm(config, "model.norm"),
            "tied_embeddings": bool(config.tie_word_embeddings),
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": float(config.initializer_range),
            "config": content,
            "embedding": "model.embed_tokens",
            "head": "lm_head",
            **changes,
        }
    )
