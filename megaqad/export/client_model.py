"""What an export computes: transformers' own model with the stored weights, rounding what engines round."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megaqad.export.client import Client, model_of
from megaqad.export.client_experts import NAMES, USUAL, RoundedExperts, slots
from megaqad.export.client_layout import CacheLayout

CACHED_ATTENTION = "megaqad_rounded_kv_cache"
"""Name under which transformers knows the attention that rounds keys and values."""


def load_client_model(client: Client) -> nn.Module:
    """transformers' model in FP32 with the stored weights, dequantized; its activations stay as they are."""
    model = model_of(client.config).eval()
    with torch.no_grad():
        for name, slot in slots(model, client.config["model_type"]).items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in client.layouts:
                slot.copy_(client.weight(module))
            else:
                slot.copy_(client.tensor(name))
    return model


def round_activations(client: Client, model: nn.Module) -> None:
    """From now on ``model`` rounds the inputs of its quantized linears, and its keys and values, as engines do."""
    modules = dict(model.named_modules())
    for name, layout in client.layouts.items():
        if layout.round_input is not None and name in modules:
            modules[name].register_forward_pre_hook(_input_hook(_rounding(client, name)))
    _round_experts(client, model)
    if client.cache is not None:
        _round_cache(client, client.cache, model)


def _rounding(client: Client, module: str) -> Callable[[Tensor], Tensor]:
    """What rounds the inputs of one module; nothing where they stay as they are."""
    layout = client.layouts.get(module)
    if layout is None or layout.round_input is None:
        return lambda x: x
    rounding = layout.round_input
    scales = [] if layout.input_scale is None else [client.tensor(f"{module}.{layout.input_scale}")]
    return lambda x: rounding(x, *scales)


def _input_hook(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(args[0]), *args[1:])

    return hook


def _round_experts(client: Client, model: nn.Module) -> None:
    """Put experts that round their inputs in the place of those that do not."""
    block, (gate, _, down) = NAMES.get(client.config["model_type"], USUAL)
    for name, module in list(model.named_modules()):
        weight = dict(module.named_parameters(recurse=False)).get("gate_up_proj")
        if weight is None or weight.dim() != 3:
            continue
        prefix = name.replace(f".{USUAL[0]}.", f".{block}.")
        rounds = [
            (_rounding(client, f"{prefix}.{expert}.{gate}"), _rounding(client, f"{prefix}.{expert}.{down}"))
            for expert in range(len(weight))
        ]
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).add_module(leaf, RoundedExperts(module, rounds))


def _round_cache(client: Client, cache: CacheLayout, model: nn.Module) -> None:
    """Give ``model`` an attention that rounds the keys and values it is handed, which are those of the cache."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    one = torch.ones(())
    scales = {module: client.tensor(name) if client.has_cache_scales else one for name, module in cache.modules.items()}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix = f"model.layers.{module.layer_idx}.self_attn"
        key = cache.round(key, scales[f"{prefix}.k_proj"])
        value = cache.round(value, scales[f"{prefix}.v_proj"])
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(CACHED_ATTENTION, attention)
    AttentionMaskInterface.register(CACHED_ATTENTION, sdpa_mask)
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(CACHED_ATTENTION)
