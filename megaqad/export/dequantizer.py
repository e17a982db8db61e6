"""A second, small implementation of reading the number formats, for verification only.

It shares nothing with ``megaqad.nvfp4`` and ``megaqad.quantization.numbers`` and follows another road on purpose: E2M1
values come from a 16-entry table, and rounding is done by scaling to integers and rounding half to even, where the
others count decision points and cast. An error would have to be made twice, differently, to go unseen.
"""

import torch
from torch import Tensor, nn

_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1)
"""[256, 2]: the two values of a byte, that of the low nibble first."""


def _unpack(packed: Tensor) -> Tensor:
    """float32 [N, K] from uint8 [N, K / 2]."""
    return nn.functional.embedding(packed.int(), _PAIRS).flatten(-2)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    """``values`` [N, K], in place, times the scales [N, K / block] of their blocks."""
    rows, inputs = values.shape
    blocks = values.view(rows, scales.shape[-1], inputs // scales.shape[-1])
    return blocks.mul_(scales.unsqueeze(-1)).view(rows, inputs)


def _powers(exponents: Tensor) -> Tensor:
    """2^(e - 127) of uint8 exponents: they are the exponent bits of a float32, but for 0, which is subnormal there."""
    bits = torch.where(exponents == 0, 1 << 22, exponents.to(torch.int32) << 23).to(torch.int32)
    return bits.view(torch.float32)


def read_nvfp4(packed: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    """float32 [N, K] from uint8 [N, K / 2], float8_e4m3fn [N, K / 16] and float32 []."""
    return _scaled(_unpack(packed), block_scales.float() * global_scale)


def read_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, K] from float8_e4m3fn [N, K] and float32 []."""
    return weight.float() * scale


def read_mxfp8(weight: Tensor, exponents: Tensor) -> Tensor:
    """float32 [N, K] from float8_e4m3fn [N, K] and uint8 [N, K / 32]."""
    return _scaled(weight.float(), _powers(exponents))


def read_mxfp4(packed: Tensor, exponents: Tensor) -> Tensor:
    """float32 [N, K] from uint8 [N, K / 2] and uint8 [N, K / 32]."""
    return _scaled(_unpack(packed), _powers(exponents))


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of ``values``; ties to the even mantissa, beyond 6 to 6.

    The grid's step is 1/2 below 2, 1 below 4 and 2 above; ``torch.round`` goes to even at a tie.
    """
    size = values.abs().clamp(max=6.0)
    rounded = torch.where(
        size < 2, torch.round(size * 2) / 2, torch.where(size < 4, size.round(), (size / 2).round() * 2)
    )
    return torch.copysign(rounded, values)


def round_e4m3(values: Tensor) -> Tensor:
    """The nearest of E4M3's values, ties to even, beyond 448 to 448.

    Its step is an eighth of the power of two below the magnitude, and 2^-9 under 2^-6.
    """
    size = values.abs().clamp(max=448.0)
    step = torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-6)))) / 8
    return torch.copysign((size / step).round() * step, values)


def round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """What an engine multiplies with: ``x`` [.., K] in NVFP4 under the stored scale, back in its own dtype."""
    blocks = x.float().unflatten(-1, (-1, 16))
    ideal = blocks.abs().amax(-1, keepdim=True) / (6.0 * scale)
    block_scale = ideal.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * scale
    return (round_e2m1(blocks / block_scale) * block_scale).flatten(-2).to(x.dtype)


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` in E4M3 under the stored scale."""
    return (round_e4m3(x.float() / scale) * scale).to(x.dtype)


def _token_scales(x: Tensor, largest: float) -> Tensor:
    """[.., 1]: the scale under which each token's largest magnitude is ``largest``; tiny for a token of zeros."""
    return x.float().abs().amax(-1, keepdim=True).div(torch.tensor(largest)).clamp(min=1e-30)


def round_nvfp4_tokens(x: Tensor) -> Tensor:
    """``x`` [.., K] in NVFP4 with a global scale for each token."""
    return round_nvfp4(x, _token_scales(x, 2688.0).unsqueeze(-1))


def round_fp8_tokens(x: Tensor) -> Tensor:
    """``x`` [.., K] in E4M3 with a scale for each token."""
    return round_fp8(x, _token_scales(x, 448.0))


def round_mxfp8(x: Tensor) -> Tensor:
    """``x`` [.., K] in E4M3 under a power of two per 32 values."""
    scale = _block_powers(x, 448.0)
    return (round_e4m3(x.float() / scale) * scale).to(x.dtype)


def round_mxfp4(x: Tensor) -> Tensor:
    """``x`` [.., K] in E2M1 under a power of two per 32 values."""
    scale = _block_powers(x, 6.0)
    return (round_e2m1(x.float() / scale) * scale).to(x.dtype)


def _block_powers(x: Tensor, largest: float) -> Tensor:
    """[.., K]: the least power of two, not below 2^-127, under which every value of the block is within ``largest``."""
    amax = x.double().unflatten(-1, (-1, 32)).abs().amax(-1)
    exponent = torch.log2(amax / largest).ceil().clamp(min=-127.0)
    return torch.exp2(exponent).float().repeat_interleave(32, dim=-1)
