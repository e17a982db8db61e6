"""The readable definition of NVFP4 in the division form, bit for bit ModelOpt's ``NVFP4QTensor``.

Slow and plain: one line per step, no buffers, no tricks. Every fast path is tested for equality with this file, and
this file with ModelOpt itself. Shapes: ``B = K // 16`` blocks along the last dimension.
"""

import torch
from torch import Tensor

from megaqad.nvfp4.format import (
    BLOCK_SIZE,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    NVFP4Tensor,
    global_scale_from_amax,
    tensor_amax,
)


def encode_e2m1(y: Tensor) -> Tensor:
    """Round float32 ``y`` (any shape) to the nearest E2M1 code, uint8 in 0..15, ties to the even mantissa.

    A magnitude's code is the number of midpoints it lies above. A midpoint itself goes to the neighbour whose mantissa
    bit is 0, so alternate midpoints count when reached and when passed. The sign is that of ``y < 0``: minus zero is 0.
    Comparisons are negated so that NaN, which fails every one, lies above all midpoints: code 7, as in ModelOpt.
    """
    a = y.abs()
    above = (~(a <= 0.25), ~(a < 0.75), ~(a <= 1.25), ~(a < 1.75), ~(a <= 2.5), ~(a < 3.5), ~(a <= 5.0))
    magnitude = torch.stack(above).sum(0)
    return (magnitude + 8 * (y < 0)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """The float32 values of E2M1 codes, integers in 0..15 (any shape); code 8, minus zero, is read as plain 0."""
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    return torch.cat((magnitudes, 0.0 - magnitudes))[codes.long()]


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The float32 values [..., K] of E2M1 codes uint8 [..., K // 2], the even one in the low nibble."""
    return decode_e2m1(torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2))


def decode_e8m0(exponents: Tensor) -> Tensor:
    """The float32 values 2^(code - 127) of MX scales, uint8 (any shape); exact, the subnormal 2^-127 included."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 127)


def block_scales(block_amax: Tensor, global_scale: Tensor) -> Tensor:
    """The E4M3 scales of blocks with these amax (any shape): the nearest to what makes each amax a 6; 1 for zero."""
    ideal = block_amax / (E2M1_MAX * global_scale)
    ideal = torch.where(ideal == 0, 1.0, ideal)
    # Clamp before the cast: below, so that a small block keeps its signal; above, because E4M3 has no infinity.
    return ideal.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None) -> NVFP4Tensor:
    """``x`` [..., K] in BF16, FP16 or FP32 to NVFP4 under the global scale of ``amax`` (of ``x`` itself when None).

    ``amax``, float32 [], or [..., 1] for a global scale of each row's own, which then broadcasts over its blocks.
    ``block_amax``, float32 [..., B], stands in for the blocks' own maxima where their scales are chosen otherwise.
    """
    global_scale = global_scale_from_amax(tensor_amax(x) if amax is None else amax)
    blocks = x.detach().float().unflatten(-1, (-1, BLOCK_SIZE))  # [..., B, 16]

    largest = blocks.abs().amax(-1) if block_amax is None else block_amax  # [..., B]
    e4m3 = block_scales(largest, global_scale)

    scales = e4m3.float() * global_scale
    codes = encode_e2m1(blocks / scales.unsqueeze(-1)).flatten(-2)  # [..., K]
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return NVFP4Tensor(packed, e4m3, global_scale)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """The values of ``q`` as ``dtype`` [..., K]: multiplied in float32, then rounded once."""
    blocks = unpack_e2m1(q.codes).unflatten(-1, (-1, BLOCK_SIZE))  # [..., B, 16]
    scales = q.block_scales.float() * q.global_scale
    return (blocks * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def run(
    x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None, *, want_values: bool, want_codes: bool
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    """What is wanted of ``x`` [..., K]: its values after one trip through NVFP4, in its own dtype, and its codes."""
    q = quantize(x, amax, block_amax)
    return dequantize(q, x.dtype) if want_values else None, q if want_codes else None


def squared_errors(blocks: Tensor, scales: Tensor) -> Tensor:
    """Of ``blocks`` [B, 16] rounded to E2M1 under ``scales`` float32 [B]: float32 [B], neighbours summed first."""
    scale = scales.unsqueeze(-1)
    errors = (decode_e2m1(encode_e2m1(blocks.float() / scale)) * scale - blocks.float()).square()
    while errors.shape[-1] > 1:
        errors = errors[..., 0::2] + errors[..., 1::2]
    return errors.squeeze(-1)


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each row of ``x`` [..., K] as float32 ``[..., 1]``; NaN where the row holds one."""
    return x.detach().abs().amax(-1, keepdim=True).float()
