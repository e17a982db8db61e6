"""The two modules that Megatron-Core's local layers lack, and the rotary frequencies of the checkpoint.

*RMSNorm*: Megatron's own local norm refuses sequence parallelism. This one computes what transformers' does
(statistics in FP32, result cast back, then the weight) and marks its weight ``sequence_parallel``, by which Megatron
knows that the weight's gradient must be summed over the tensor-parallel ranks.

*CausalAttention*: Megatron's local attention materialises the s x s scores, 4 bytes x heads x s^2. Torch's
``scaled_dot_product_attention`` walks them in tiles on CPU and on CUDA, with grouped key/value heads left unexpanded.

Shapes: s sequence, b batch, n heads of this rank, g key/value heads of this rank, d head size.
"""

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megaqad.models.description import ModelDescription


class QuantizerParameter(nn.Parameter):
    """A parameter that no Hugging Face tensor holds as it is: a learned scale of the quantizers."""


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dim, in the order of operations of transformers.

    Input and output [.., size] in any sharding of the leading dims; the weight [size] is replicated. No collectives.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class CausalAttention(nn.Module):
    """Causal softmax attention within each sequence; takes the place of Megatron's ``DotProductAttention``.

    The heads are this rank's share (tensor parallel), every sequence is whole (no context parallelism); no collectives.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "every sequence must be whole on its rank"
        assert attn_mask_type is AttnMaskType.causal, f"only causal attention, not {attn_mask_type}"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]."""
        assert attention_mask is None, "the mask is causal and nothing else"
        assert attention_bias is None, "no attention bias"
        assert packed_seq_params is None, "packed sequences are not supported"
        mixed = nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [b, n, s, d]
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)  # [s, b, n * d]


def rotary_frequencies(description: ModelDescription) -> Tensor:
    """Inverse frequencies of the rotary embedding, float32 [head_dim / 2], the same numbers as transformers'.

    Llama-3 scaling divides the frequencies of long wavelengths by ``factor``, keeps those of short ones and
    interpolates between; Megatron's own version fixes three of its four constants.
    """
    steps = torch.arange(0, description.head_dim, 2, dtype=torch.int64).float() / description.head_dim
    frequencies = 1.0 / (description.rope_theta**steps)
    scaling = description.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    long = scaling.original_max_position_embeddings / scaling.low_freq_factor
    short = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = torch.where(wavelength > long, frequencies / scaling.factor, between)
    return torch.where(wavelength < short, frequencies, stretched)
