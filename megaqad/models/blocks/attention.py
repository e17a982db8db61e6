"""Softmax attention with grouped key/value heads: q, k, v -> norms -> rotary -> attention -> o.

Tensor parallelism divides heads. A model with fewer key/value heads than ranks has each such head on several
neighbouring ranks: they compute with equal copies, ``training/shared.py`` sums their gradients.

Megatron's local attention materialises the s x s scores, 4 bytes x heads x s^2. PyTorch's
``scaled_dot_product_attention`` walks them in tiles on CPU and on CUDA, with grouped key/value heads left unexpanded.

Letters: s sequence, b batch, n query heads of this rank, g key/value heads of this rank, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaqad.models.blocks.block import Builder, product_flops
from megaqad.models.blocks.norm import Norm, RMSNorm
from megaqad.models.blocks.rotary import Rotary, Tables
from megaqad.models.operations import PLAIN, Operations
from megaqad.models.weights import COLUMN, ROW, WHOLE, Cut, Heads, HfTensor, Weight
from megaqad.runtime.sizes import ParallelSizes


@dataclass(frozen=True)
class QueryScale:
    """Queries far into a sequence are longer: times 1 + beta * log(1 + floor(position / length))."""

    beta: float
    length: int

    def table(self, length: int, like: Tensor) -> Tensor:
        """Of positions 0 to length - 1: [s, 1, 1, 1], computed in FP32, in the dtype and on the device of ``like``."""
        positions = torch.arange(length, device=like.device)
        scale = 1 + self.beta * torch.log(1 + torch.floor(positions / self.length))
        return scale.to(like.dtype)[:, None, None, None]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Self-attention of one layer."""

    module: str
    """Its Hugging Face name; the projections are ``<module>.q_proj`` and so on."""
    hidden: int
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    rotary: Rotary | None
    """None: positions are left to the mask."""
    qkv_bias: bool = False
    out_bias: bool = False
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    scale: float | None = None
    """Of the scores; None: 1 / sqrt(head_dim)."""
    query_scale: QueryScale | None = None
    window: int | None = None
    """Positions that one sees, itself included; None: all before it."""
    fused: str | None = None
    """Name of the projection in whose rows the file holds q, k and v; None: they are apart."""

    @property
    def key_module(self) -> str:
        """The module that makes the keys, by which their scale is named, also where the file fuses it with others."""
        return f"{self.module}.k_proj"

    @property
    def value_module(self) -> str:
        return f"{self.module}.v_proj"

    def _projections(self, ending: str, *inputs: int) -> tuple[HfTensor, ...]:
        """q, k and v of the checkpoint, with so many inputs (a bias has none)."""
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        of_keys = Cut(0, units=self.groups)
        parts = (("q_proj", 0, query, COLUMN), ("k_proj", query, key, of_keys), ("v_proj", query + key, key, of_keys))
        if self.fused is None:
            names = (f"{self.module}.{name}.{ending}" for name, _, _, _ in parts)
            return tuple(HfTensor(name, (part[2], *inputs), part[3]) for name, part in zip(names, parts, strict=True))
        whole = (query + 2 * key, *inputs)
        name = f"{self.module}.{self.fused}.{ending}"
        return tuple(HfTensor(name, whole, cut, (first, first + rows)) for _, first, rows, cut in parts)

    @property
    def _join(self) -> Heads:
        return Heads(self.heads, self.groups, self.head_dim)

    @property
    def qkv(self) -> Weight:
        return Weight("linear_qkv.weight", self._projections("weight", self.hidden), self._join, linear=True)

    @property
    def out(self) -> Weight:
        part = HfTensor(f"{self.module}.o_proj.weight", (self.hidden, self.heads * self.head_dim), ROW)
        return Weight("linear_proj.weight", (part,), linear=True)

    def weights(self) -> Sequence[Weight]:
        weights = [self.qkv]
        if self.qkv_bias:
            weights.append(Weight("linear_qkv.bias", self._projections("bias"), self._join))
        weights.append(self.out)
        if self.out_bias:
            weights.append(Weight("linear_proj.bias", (HfTensor(f"{self.module}.o_proj.bias", (self.hidden,), WHOLE),)))
        norms = (("q_layernorm", self.query_norm), ("k_layernorm", self.key_norm))
        return [*weights, *(norm.weight(name) for name, norm in norms if norm is not None)]

    def build(self, builder: Builder) -> nn.Module:
        return SelfAttention(self, builder)

    def refuse(self, sizes: ParallelSizes) -> str | None:
        if self.heads % self.groups:
            return f"{self.heads} attention heads are no multiple of {self.groups} key/value heads: correct config.json"
        tensor = sizes.tensor
        if self.heads % tensor == 0 and (self.groups % tensor == 0 or tensor % self.groups == 0):
            return None
        fitting = [
            size
            for size in range(1, self.heads + 1)
            if self.heads % size == 0 and (self.groups % size == 0 or size % self.groups == 0)
        ]
        return (
            f"parallel.tensor={tensor} does not divide the {self.heads} attention heads and {self.groups} key/value "
            f"heads of {self.module}; choose one of {', '.join(map(str, fitting))}"
        )

    def flops(self, tokens: int) -> float:
        seen = tokens / 2 if self.window is None else min(tokens / 2, self.window)
        return product_flops([self.qkv, self.out]) + 4.0 * self.heads * self.head_dim * seen


class SelfAttention(nn.Module):
    """[s(/tp), b, h] -> [s(/tp), b, h]; collectives those of its two parallel linear layers."""

    def __init__(self, block: Attention, builder: Builder) -> None:
        super().__init__()
        self.block, self.operations = block, builder.operations
        self.linear_proj = builder.linear(block.out, bias=block.out_bias)
        self.linear_qkv = builder.linear(block.qkv, bias=block.qkv_bias)
        self.q_layernorm = None if block.query_norm is None else block.query_norm.build(builder)
        self.k_layernorm = None if block.key_norm is None else block.key_norm.build(builder)
        self.cache = builder.choices.cache(block.key_module, block.value_module)
        self.local_groups = max(block.groups // builder.ranks.sizes.tensor, 1)

    def forward(self, hidden: Tensor, tables: Tables) -> Tensor:
        block, dim = self.block, self.block.head_dim
        mixed, _ = self.linear_qkv(hidden)
        grouped = mixed.view(*mixed.shape[:2], self.local_groups, -1)  # [s, b, g, (n / g + 2) d]
        query, key, value = grouped.split([grouped.shape[-1] - 2 * dim, dim, dim], dim=-1)
        query = query.reshape(*query.shape[:2], -1, dim)  # [s, b, n, d]
        if self.q_layernorm is not None:
            query = _normed(self.q_layernorm, query)
        if self.k_layernorm is not None:
            key = _normed(self.k_layernorm, key)
        if block.rotary is not None:
            table = tables.of(block.rotary, query.dtype, query.device)
            query, key = self.operations.rotate(query, *table), self.operations.rotate(key, *table)
        scale = block.query_scale
        if scale is not None:
            query = query * tables.kept(scale, query.dtype, lambda: scale.table(tables.length, query))
        if self.cache is not None:
            key, value = self.cache(key, value)
        mixed = causal_attention(query, key, value, self.operations, scale=block.scale, window=block.window)
        output: Tensor = self.linear_proj(mixed)[0]
        return output


def _normed(norm: RMSNorm, heads: Tensor) -> Tensor:
    """[s, b, n, d], each head by itself or, by a norm of all heads' size, all heads of a token together."""
    together = norm.size > heads.shape[-1]
    normed: Tensor = norm(heads.flatten(2)).view_as(heads) if together else norm(heads)
    return normed


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operations: Operations = PLAIN,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]; every sequence is whole on its rank.

    Args:
        scale: of the scores; None: 1 / sqrt(d).
        window: position i sees i - window + 1 to i; None: 0 to i.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n or g, s, d]
    if window is None or window >= q.shape[2]:
        grouped = q.shape[1] != k.shape[1]
        attend = nn.functional.scaled_dot_product_attention
        mixed = attend(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        mixed = operations.windowed_attention(q, k, v, scale=scale, window=window)
    return mixed.permute(2, 0, 1, 3).flatten(2)
