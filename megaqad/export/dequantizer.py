"""A second, small implementation of NVFP4 reading, for verification only.

It shares nothing with ``megaqad.nvfp4`` and follows another road on purpose: values come from a 16-entry table, and
rounding to E2M1 is done by scaling to integers and rounding half to even, where the other counts decision points. An
error would have to be made twice, differently, to go unseen.
"""

import torch
from torch import Tensor

_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def read_weight(packed: Tensor, block_scales: Tensor, global_scale: Tensor) -> Tensor:
    """float32 [N, K] from uint8 [N, K / 2], float8_e4m3fn [N, K / 16] and float32 []."""
    codes = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=torch.long)
    codes[..., 0::2] = packed % 16
    codes[..., 1::2] = packed // 16
    scales = (block_scales.float() * global_scale).repeat_interleave(16, dim=-1)
    return _VALUES[codes] * scales


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with the sign of ``values``; ties to the even mantissa, beyond 6 to 6.

    The grid's step is 1/2 below 2, 1 below 4 and 2 above; ``torch.round`` goes to even at a tie.
    """
    size = values.abs().clamp(max=6.0)
    rounded = torch.where(
        size < 2, torch.round(size * 2) / 2, torch.where(size < 4, size.round(), (size / 2).round() * 2)
    )
    return torch.copysign(rounded, values)


def quantize_input(x: Tensor, input_scale: Tensor) -> Tensor:
    """What a W4A4 engine multiplies with: ``x`` [.., K] in NVFP4 under the stored scale, back in its own dtype."""
    blocks = x.float().unflatten(-1, (-1, 16))
    ideal = blocks.abs().amax(-1, keepdim=True) / (6.0 * input_scale)
    scale = ideal.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * input_scale
    return (round_e2m1(blocks / scale) * scale).flatten(-2).to(x.dtype)
