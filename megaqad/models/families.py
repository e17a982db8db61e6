"""One table per model family: which Hugging Face tensors make up which Megatron-Core parameter.

A row reads: *this Megatron parameter is made of these Hugging Face tensors, joined so, sharded so*. Import, export,
the checks and the quantization recipe all read the same rows, so a family is described once.

Shapes are written with the names of ``ModelDescription.dims``. Sharding is said in terms of the Hugging Face tensor,
and cutting comes before joining: a rank's Megatron parameter is the join of its cuts. That holds because Megatron
interleaves q, k, v per attention group and keeps one rank's gate and up together. It is what lets every rank read,
quantize and write its own part without seeing the others'.

This file imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from megaqad.errors import UserError


class Shard(Enum):
    """How the tensor-parallel ranks divide one Hugging Face tensor among themselves."""

    REPLICATED = "every rank holds all of it"
    COLUMN = "dim 0 (outputs) in equal parts"
    ROW = "dim 1 (inputs) in equal parts"
    VOCAB = "dim 0 in equal parts after padding to a multiple of the tensor-parallel size"

    @property
    def dim(self) -> int | None:
        """The dim that is cut, None when none is."""
        return {Shard.REPLICATED: None, Shard.COLUMN: 0, Shard.ROW: 1, Shard.VOCAB: 0}[self]


class Join(Enum):
    """How the parts of one Megatron parameter lie in it, along dim 0."""

    COPY = "one tensor, as it is"
    QKV = "per key/value group: its query heads, its key head, its value head"
    GATE_UP = "all gate rows, then all up rows"


@dataclass(frozen=True)
class HfTensor:
    """One tensor of the Hugging Face checkpoint; ``{layer}`` in the name is the global layer index."""

    name: str
    shape: tuple[str, ...]

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor: the name without its last part."""
        return self.name.rpartition(".")[0]

    def sizes(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The whole tensor's shape in numbers."""
        return tuple(dims[name] for name in self.shape)


@dataclass(frozen=True)
class Row:
    """One Megatron parameter; ``{layer}`` in its name is the index within the chunk that holds the layer."""

    megatron: str
    parts: tuple[HfTensor, ...]
    shard: Shard
    join: Join = Join.COPY
    role: str | None = None
    """``qkv``, ``proj``, ``fc1`` or ``fc2`` when this is the weight of that linear layer."""
    alias: bool = False
    """A second copy of a tensor that another row owns (tied head): filled on import, not written on export."""

    def at_layer(self, layer: int) -> tuple[HfTensor, ...]:
        """The parts with the global layer index filled in."""
        return tuple(replace(part, name=part.name.format(layer=layer)) for part in self.parts)


@dataclass(frozen=True)
class Family:
    """A model family: its rows in checkpoint order, and what transformers assumes when config.json is silent."""

    name: str
    architecture: str
    first: tuple[Row, ...]
    """Rows before the layers."""
    layer: tuple[Row, ...]
    """Rows of every layer."""
    last: tuple[Row, ...]
    """Rows after the layers."""
    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    ignored_suffixes: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Tensors that old checkpoints carry and every reader recomputes."""


_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers.{layer}."


def _hf(name: str, shape: str) -> HfTensor:
    return HfTensor(name, tuple(shape.split()))


def _linear(role: str, megatron: str, shard: Shard, join: Join, *parts: tuple[str, str]) -> Row:
    return Row(
        f"{_MEGATRON_LAYER}{megatron}.weight",
        tuple(_hf(f"{_LAYER}{name}.weight", shape) for name, shape in parts),
        shard,
        join,
        role,
    )


def _norm(megatron: str, name: str, shape: str = "hidden") -> Row:
    return Row(f"{_MEGATRON_LAYER}{megatron}.weight", (_hf(f"{_LAYER}{name}.weight", shape),), Shard.REPLICATED)


EMBEDDING_ROW = Row(
    "embedding.word_embeddings.weight", (_hf("model.embed_tokens.weight", "vocab hidden"),), Shard.VOCAB
)
_FINAL_NORM = Row("decoder.final_layernorm.weight", (_hf("model.norm.weight", "hidden"),), Shard.REPLICATED)
HEAD_ROW = Row("output_layer.weight", (_hf("lm_head.weight", "vocab hidden"),), Shard.VOCAB)

_DENSE_LAYER = (
    _norm("input_layernorm", "input_layernorm"),
    _linear(
        "qkv",
        "self_attention.linear_qkv",
        Shard.COLUMN,
        Join.QKV,
        ("self_attn.q_proj", "q hidden"),
        ("self_attn.k_proj", "kv hidden"),
        ("self_attn.v_proj", "kv hidden"),
    ),
    _linear("proj", "self_attention.linear_proj", Shard.ROW, Join.COPY, ("self_attn.o_proj", "hidden q")),
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    _linear(
        "fc1",
        "mlp.linear_fc1",
        Shard.COLUMN,
        Join.GATE_UP,
        ("mlp.gate_proj", "ffn hidden"),
        ("mlp.up_proj", "ffn hidden"),
    ),
    _linear("fc2", "mlp.linear_fc2", Shard.ROW, Join.COPY, ("mlp.down_proj", "hidden ffn")),
)
_QKV_BIAS = Row(
    f"{_MEGATRON_LAYER}self_attention.linear_qkv.bias",
    (
        _hf(f"{_LAYER}self_attn.q_proj.bias", "q"),
        _hf(f"{_LAYER}self_attn.k_proj.bias", "kv"),
        _hf(f"{_LAYER}self_attn.v_proj.bias", "kv"),
    ),
    Shard.COLUMN,
    Join.QKV,
)
_QK_NORM = (
    _norm("self_attention.q_layernorm", "self_attn.q_norm", "head"),
    _norm("self_attention.k_layernorm", "self_attn.k_norm", "head"),
)
_DEFAULTS: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}


def _dense(
    name: str,
    architecture: str,
    defaults: Mapping[str, Any],
    extra: tuple[Row, ...] = (),
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        first=(EMBEDDING_ROW,),
        layer=(*_DENSE_LAYER, *extra),
        last=(_FINAL_NORM, HEAD_ROW),
        defaults={**_DEFAULTS, **defaults},
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _dense("llama", "LlamaForCausalLM", {"max_position_embeddings": 2048}),
        _dense(
            "mistral",
            "MistralForCausalLM",
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        _dense(
            "qwen2",
            "Qwen2ForCausalLM",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "max_window_layers": 28,
            },
            (_QKV_BIAS,),
            qkv_bias=True,
        ),
        _dense(
            "qwen3",
            "Qwen3ForCausalLM",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "max_window_layers": 28,
            },
            _QK_NORM,
            qk_norm=True,
        ),
    )
}


def family_of(config: Mapping[str, Any], model_dir: Path) -> Family:
    """The family of a config.json, by ``architectures`` or, where that is missing, by ``model_type``.

    Raises:
        UserError: the architecture is none of ``FAMILIES``.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if architectures == [family.architecture] or (not architectures and config.get("model_type") == family.name):
            return family
    found = ", ".join(map(str, architectures)) or f"model_type={config.get('model_type')!r}"
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    raise UserError(f"{model_dir}: architecture {found} is not supported; choose a checkpoint of one of: {supported}")
