"""An export as transformers runs it, rounding what engines round: whole, or one layer at a time.

A 70B model in FP32 takes 280 GB. Streamed, it takes the memory of its largest layer: transformers' model is built
without memory, its decoder runs once on all sequences, and hooks give each part (the embedding, each layer, the last
norm) its weights just before it computes and take them away after it. Masks, rotary embeddings and whatever else a
family passes to its layers are transformers' own, since its forward runs as it is. Then the head computes the logits
of some tokens at a time: again in the model's own forward, whose decoder answers with what it found before.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaqad.export.client.checkpoint import Advance, Client
from megaqad.export.client.files import VerificationError
from megaqad.export.client.layouts import CacheLayout, Layout
from megaqad.export.client.parameters import model_of, skeleton_of

TOKENS_AT_ONCE = 256
"""Whose logits the streamed model's head computes together: 256 MB with 256,000 of each."""
ROUNDED_CACHE = "megaqad_rounded_kv_cache"
"""Name under which transformers knows the attention that rounds keys and values."""
ROUNDED_EXPERTS = "megaqad_rounded_experts"
"""Name under which transformers knows the experts that round their inputs."""


class ClientModel(Protocol):
    """transformers' model with the stored weights, dequantized; its activations stay as they are until told."""

    module: Any
    """transformers' model."""

    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Of int64 [b, s], in order, [n, V] of some tokens at a time."""
        ...


class WholeModel:
    """All of it in memory."""

    def __init__(self, client: Client, dtype: torch.dtype, advance: Advance) -> None:
        from transformers.initialization import no_init_weights

        with no_init_weights():  # random ones take longer than all else
            model: Any = model_of(client.config, dtype).eval()
        model.tie_weights()
        self.module, self._advance = model, advance
        state = self.module.state_dict()  # shares memory with the model
        for done, (name, parameter) in enumerate(client.parameters.items()):
            state[name].copy_(parameter.value(client.unquantized, dtype))
            advance("weights", done + 1, len(client.parameters))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        for done, ids in enumerate(tokens.split(1)):
            yield self.module(input_ids=ids, use_cache=False).logits[0]
            self._advance("sequences", done + 1, len(tokens))


class StreamedModel:
    """One part of it in memory, and the hidden states of all sequences."""

    def __init__(self, client: Client, dtype: torch.dtype, advance: Advance) -> None:
        self.module: Any = skeleton_of(client.config, dtype).eval()
        self._client, self._dtype, self._advance = client, dtype, advance
        compute_buffers(self.module)
        # A tied head holds the embedding's own empty tensor, and so leads to the embedding's parameter.
        held = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self._parameters = {held[name]: parameter for name, parameter in client.parameters.items()}
        decoder: Any = self.module.base_model
        self._filled: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}
        """By part, what it holds: (owner, name, the empty tensor that was there)."""
        self._parts = [part for part in _parts(decoder) if part.state_dict()]
        self._done = 0
        for part in self._parts:
            part.register_forward_pre_hook(lambda module, args: self._enter(module))
            part.register_forward_hook(lambda module, args, output: self._empty(module))
        for around in (self.module, decoder):
            self._fill(around, [around])  # what belongs to no part stays

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        model, self._done = self.module, 0
        decoder, name = model.base_model, model.base_model_prefix
        output = decoder(input_ids=tokens, use_cache=False)
        heads = [module for module in model.children() if module is not decoder]
        for head in heads:
            self._fill(head, head.modules())
        try:
            for hidden in output.last_hidden_state.flatten(0, 1).unsqueeze(0).split(TOKENS_AT_ONCE, dim=1):
                setattr(model, name, _Answer(type(output)(last_hidden_state=hidden)))
                yield model(input_ids=tokens[:1], use_cache=False).logits[0]
        finally:
            setattr(model, name, decoder)
            for head in heads:
                self._empty(head)

    def _enter(self, part: nn.Module) -> None:
        self._fill(part, part.modules())
        self._done += 1
        self._advance("layers", self._done, len(self._parts))

    def _fill(self, part: nn.Module, owners: Iterable[nn.Module]) -> None:
        """Give the ``owners``, which make up a part of the model, their weights."""
        filled = self._filled[part] = []
        for owner in owners:
            for name, empty in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if empty not in self._parameters:  # a buffer that no checkpoint holds
                    continue
                value = self._parameters[empty].value(self._client.unquantized, self._dtype)
                is_parameter = isinstance(empty, nn.Parameter)
                setattr(owner, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
                filled.append((owner, name, empty))

    def _empty(self, part: nn.Module) -> None:
        """Take them away again."""
        for owner, name, empty in self._filled.pop(part):
            setattr(owner, name, empty)


class _Answer(nn.Module):
    """A decoder that has computed already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def _parts(decoder: nn.Module) -> Iterator[nn.Module]:
    """What a decoder runs one after another: its children, and those of its lists of layers."""
    for child in decoder.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


@torch.no_grad()
def compute_buffers(model: Any) -> None:
    """Give a model that was built without memory the buffers that no checkpoint holds: rotary frequencies and the like.

    transformers computes them in ``_init_weights``, as ``from_pretrained`` has it do for the same reason. One that it
    leaves as it was is found by computing twice from different beginnings.

    Raises:
        VerificationError: names a buffer that is not computed so.
    """
    buffers = [name for name, _ in model.named_non_persistent_buffers()]
    owners = dict(model.named_modules())
    found: list[dict[str, Tensor]] = []
    for beginning in (0, 1):
        for name in buffers:
            owner, _, kind = name.rpartition(".")
            empty = owners[owner].get_buffer(kind)
            setattr(owners[owner], kind, torch.full_like(empty, beginning, device="cpu"))
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in buffers):
            model._init_weights(owners[owner])
        found.append({name: model.get_buffer(name).clone() for name in buffers})
    for name in buffers:
        if not torch.equal(*(values[name] for values in found)):
            raise VerificationError(f"transformers does not compute {name} by itself: set verify.model=full, or files")


def round_activations(client: Client, model: Any) -> None:
    """From now on ``model`` rounds the inputs of its quantized linears, and its keys and values, as engines do."""
    modules = dict(model.named_modules())
    experts: dict[nn.Module, dict[str, list[Rounding]]] = {}
    for parameter in client.parameters.values():
        if not parameter.linear:
            continue
        owner, _, kind = parameter.name.rpartition(".")
        # The projections of one expert have one input, and so one scale (``rules.py``).
        roundings = [_rounding(client, sources[0].module) for sources in parameter.experts]
        if isinstance(modules[owner], nn.Linear):
            modules[owner].register_forward_pre_hook(_before(roundings[0]))
        else:
            experts.setdefault(modules[owner], {})[kind] = roundings
    if experts:
        _round_experts(model, experts)
    if client.cache is not None:
        _round_cache(client, client.cache, model)


Rounding = Callable[[Tensor], Tensor]


def _rounding(client: Client, module: str) -> Rounding:
    """What becomes of the input of a linear module."""
    layout: Layout | None = client.layouts.get(module)
    if layout is None or layout.round_input is None:
        return lambda x: x
    scales = [] if layout.input_scale is None else [client.tensor(f"{module}.{layout.input_scale}")]
    round_input = layout.round_input
    return lambda x: round_input(x, *scales)


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (rounding(args[0]), *args[1:])


def _round_experts(model: Any, roundings: dict[nn.Module, dict[str, list[Rounding]]]) -> None:
    """Give ``model`` experts that round the inputs of their two products; ``roundings`` by name of the weights."""
    from transformers.integrations.moe import ExpertsInterface

    def experts(module: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[n, h] through the experts [n, k] that the router has chosen, with its shares [n, k]."""
        result = torch.zeros_like(hidden)
        pairs = zip(roundings[module]["gate_up_proj"], roundings[module]["down_proj"], strict=True)
        for expert, (round_input, round_inner) in enumerate(pairs):
            token, place = torch.where(chosen == expert)
            if len(token) == 0:
                continue
            inner = nn.functional.linear(round_input(hidden[token]), module.gate_up_proj[expert])
            inner = round_inner(module._apply_gate(inner))
            output = nn.functional.linear(inner, module.down_proj[expert])
            result.index_add_(0, token, (output * shares[token, place, None]).to(result.dtype))
        return result

    ExpertsInterface.register(ROUNDED_EXPERTS, experts)
    model.set_experts_implementation(ROUNDED_EXPERTS)


def _round_cache(client: Client, cache: CacheLayout, model: Any) -> None:
    """Give ``model`` an attention that rounds the keys and values it is handed, which are those of the cache."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    one = torch.ones(())
    scales = {module: client.tensor(name) if client.has_cache_scales else one for name, module in cache.modules.items()}
    names = {module: name for name, module in model.named_modules()}
    plain = model.config._attn_implementation == "sdpa"

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = cache.round(key, scales[f"{names[module]}.k_proj"])
        value = cache.round(value, scales[f"{names[module]}.v_proj"])
        # transformers keeps each family's own attention beside its model
        own = sdpa_attention_forward if plain else sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(ROUNDED_CACHE, attention)
    AttentionMaskInterface.register(ROUNDED_CACHE, sdpa_mask if plain else eager_mask)
    model.set_attn_implementation(ROUNDED_CACHE)
