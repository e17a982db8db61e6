"""What a layer computes between its matrix products, in two forms; ``runtime.fused`` chooses.

| operation | plain | fused, on CUDA |
|---|---|---|
| RMSNorm | FP32, rounded where transformers rounds | PyTorch's ``rms_norm``; Gemma's by Liger-Kernel where installed |
| rotary embedding | PyTorch | one kernel, ``rotary_kernel.py``: the libraries' want other layouts of queries and keys |
| SwiGLU, GeGLU | PyTorch | Megatron-Core's, which torch.compile makes |
| attention with a window | PyTorch's SDPA, a block of queries at a time | FlexAttention |

The plain form is the oracle, and what the CPU computes. A fused form keeps FP32 inside and rounds once at its end where
the plain one rounds in between: in FP32 the same but for the order of sums, in BF16 nearer to the exact result.
Attention without a window is PyTorch's SDPA in both, which chooses cuDNN or FlashAttention by itself.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

FUSED = ("auto", "plain")
"""Values of ``runtime.fused``."""
Order = Literal["cast_first", "weight_first", "centred"]
"""Of RMSNorm. ``cast_first``: weight * cast(normalised), Llama. ``weight_first``: cast(weight * normalised), OLMo 2.
``centred``: cast((1 + weight) * normalised), Gemma, whose weights are stored less one."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: nn.functional.relu(x).square(),
}
"""By the names used here."""


class Operations:
    """PyTorch, operation by operation. Sharding is the caller's: these look at what a rank holds."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, order: Order) -> Tensor:
        """Of [.., h] over its last dim, with a weight [h]."""
        wide = x.float()
        return weighted(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), weight, order, x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[s, b, n, d] with its leading dims rotated, halves against halves.

        Args:
            cos, sin: [s, 1, 1, r], r at most d, both halves alike.
        """
        turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        turned = ((turned * cos) + (torch.cat((-second, first), dim=-1) * sin)).to(x.dtype)
        return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned

    def gated(self, inner: Tensor, activation: str) -> Tensor:
        """activation(gate) * up of [.., gate then up]."""
        gate, up = torch.chunk(inner, 2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def windowed_attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int) -> Tensor:
        """q [b, n, s, d], k and v [b, g, s, d] -> [b, n, s, d]; position i sees i - window + 1 to i."""
        parts = []
        for start in range(0, q.shape[2], window):  # the scores of one block of queries at a time
            stop, first = min(start + window, q.shape[2]), max(start - window + 1, 0)
            rows = torch.arange(start, stop, device=q.device)[:, None]
            columns = torch.arange(first, stop, device=q.device)[None]
            mask = (columns <= rows) & (columns > rows - window)
            part = nn.functional.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                attn_mask=mask,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            parts.append(part)
        return torch.cat(parts, dim=2)


PLAIN = Operations()


class Fused(Operations):
    """One kernel each, where there is one; on CUDA."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, order: Order) -> Tensor:
        if order != "centred":
            return nn.functional.rms_norm(x, weight.shape, weight, eps)
        if _lacks("liger_kernel", "Gemma's RMSNorm"):
            return super().rms_norm(x, weight, eps, order)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        normed: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 1.0, "gemma", False)
        return normed

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if _lacks("triton", "the rotary embedding"):
            return super().rotate(x, cos, sin)
        from megaqad.models.rotary_kernel import rotate

        return rotate(x, cos, sin)

    def gated(self, inner: Tensor, activation: str) -> Tensor:
        if activation == "silu":
            from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

            swiglu: Tensor = bias_swiglu_impl(inner, None, False)
            return swiglu
        if activation == "gelu_tanh":
            from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl

            geglu: Tensor = bias_geglu_impl(inner, None)
            return geglu
        return super().gated(inner, activation)

    def windowed_attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int) -> Tensor:
        attend, mask = _flex(q.shape[2], window, q.device)
        mixed: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return mixed


@functools.cache
def _flex(length: int, window: int, device: torch.device) -> tuple[Callable[..., Tensor], object]:
    """FlexAttention, compiled, and the mask that it takes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    return torch.compile(flex_attention), create_block_mask(seen, None, None, length, length, device=device)


@functools.cache
def _lacks(package: str, what: str) -> bool:
    """Whether a package is not installed; said once."""
    lacking = importlib.util.find_spec(package) is None
    if lacking:
        _log.warning("%s is not installed: %s is computed by several kernels, not one", package, what)
    return lacking


def operations(fused: str, device: torch.device) -> Operations:
    """The form that ``runtime.fused`` names, for a device."""
    assert fused in FUSED, fused
    return Fused() if fused == "auto" and device.type == "cuda" else PLAIN


def weighted(normed: Tensor, weight: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """FP32 [.., h], normalised, times the weight in one of the orders, as ``dtype``."""
    if order == "cast_first":
        return weight * normed.to(dtype)
    wide = weight.float() + 1.0 if order == "centred" else weight.float()
    return (wide * normed).to(dtype)
