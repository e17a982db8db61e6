"""The vectorised implementation: the same bits as the reference from a dozen passes over cache-sized pieces.

The reference spends its time on temporaries as large as the tensor and on comparing every element with seven midpoints.
Here a piece of the input (one piece per core's L2 cache) goes through all steps in place before the next is touched,
and rounding needs no comparison at all:

Rounding. Adding a number so large that its last mantissa bit is worth ``u`` rounds a float32 to a multiple of ``u``, to
nearest, ties to even; subtracting it again leaves the rounded value. E2M1 has u = 0.5 below 2, 1 from 2 to 4 and 2
above, that is u = p / 2 for p the power of two at or below the magnitude, held between 1 and 4. ``1.5 * 2**22 * p`` is
that large number; the 1.5 keeps the sum in the same binade for either sign.

Codes. E2M1 magnitudes times 2**-14 fall on float16's subnormals and first normals, whose bit patterns are the codes
0 to 7, shifted left by nine.

Block maxima. Non-negative floats order as their bit patterns do, and integer maxima are several times faster.

Plain PyTorch operations only, so it runs on any device and needs no compiler. Shapes: ``B`` is the number of blocks of
the whole tensor, ``b`` that of one piece.
"""

import struct
from collections.abc import Iterator

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
)

# 8192 blocks are 512 KiB of float32; two such buffers with their input and output stay inside 2 MiB of L2.
_BLOCKS_PER_THREAD = 8192
_BLOCKS_PER_LAUNCH = 1 << 20  # on an accelerator a piece is only a bound on scratch memory

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_EXPONENT = 0x7F80_0000
_BITS_OF_1, _BITS_OF_4 = 0x3F80_0000, 0x4080_0000
_ROUNDER = 1.5 * 2.0**22
_TO_HALF_BITS = 2.0**-14
_PAIR_MAGNITUDES = 0x0E00_0E00  # the code bits of two float16 in one int32
_PAIR_SIGNS = -0x7FFF_8000  # 0x80008000, their signs

_SIGNED_VALUES = (*E2M1_VALUES, *(0.0 - v for v in E2M1_VALUES))
_BYTE_VALUES = [
    struct.unpack("<q", struct.pack("<2f", _SIGNED_VALUES[byte & 0xF], _SIGNED_VALUES[byte >> 4]))[0]
    for byte in range(256)
]


def run(
    x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None, *, want_values: bool, want_codes: bool
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    """As ``reference.run``, bit for bit, in one pass over ``x``."""
    blocks = x.detach().contiguous().view(-1, BLOCK_SIZE)
    block_scales, scales, global_scale = _scales(blocks, amax, block_amax, (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE))
    # Dense, whatever strides x has in dimensions of one.
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_values else None
    codes = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8, device=x.device) if want_codes else None
    flat_values = None if values is None else values.view(-1, BLOCK_SIZE)
    flat_codes = None if codes is None else codes.view(-1, BLOCK_SIZE // 2)

    rounder = packer = None
    for piece in pieces(len(blocks), x.device):
        part, scale = blocks[piece], scales[piece]
        if rounder is None or len(rounder.y) != len(part):  # all pieces but the last are of one size
            rounder = Rounder(len(part), x.device)
            packer = None if codes is None else _Packer(len(part), x.device)
        y = rounder.y.copy_(part).div_(scale)
        if packer is not None:
            packer.keep_signs(y)
        rounder.round_()
        if packer is not None and flat_codes is not None:
            packer.pack(y, out=flat_codes[piece])
        if flat_values is not None:
            flat_values[piece] = y.mul_(scale)

    if codes is None:
        return values, None
    return values, NVFP4Tensor(codes, block_scales.view(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), global_scale)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize``, bit for bit: one table look-up gives the two values of a byte."""
    device = q.codes.device
    table = _byte_table(device)
    codes = q.codes.reshape(-1, BLOCK_SIZE // 2)
    scales = q.block_scales.float().mul_(q.global_scale).reshape(-1, 1)
    out = torch.empty(q.shape, dtype=dtype, device=device)
    flat = out.view(-1, BLOCK_SIZE)
    for piece in pieces(len(codes), device):
        pairs = torch.index_select(table, 0, codes[piece].flatten().int())
        flat[piece] = pairs.view(torch.float32).view(-1, BLOCK_SIZE).mul_(scales[piece])
    return out


def squared_errors(blocks: Tensor, scales: Tensor) -> Tensor:
    """As ``reference.squared_errors``, bit for bit; ``blocks`` are contiguous."""
    errors = torch.empty_like(scales)
    for piece in pieces(len(blocks), blocks.device):
        part, scale = blocks[piece].float(), scales[piece].unsqueeze(-1)
        rounder = Rounder(len(part), blocks.device)
        squares = rounder.y.copy_(part).div_(scale)
        rounder.round_()
        squares.mul_(scale).sub_(part).square_()
        while squares.shape[-1] > 1:
            squares = squares[..., 0::2] + squares[..., 1::2]
        errors[piece] = squares.squeeze(-1)
    return errors


def row_amax(x: Tensor) -> Tensor:
    """As ``reference.row_amax``, bit for bit but for the payload of NaN, by integer maxima."""
    bits = x.detach().contiguous().view(_BITS[x.dtype])
    return (bits & torch.iinfo(bits.dtype).max).amax(-1, keepdim=True).view(x.dtype).float()


class Rounder:
    """Rounds ``y`` float32 [b, 16], elements in units of their block's scale, to the values of E2M1, in place."""

    def __init__(self, b: int, device: torch.device) -> None:
        self.y = torch.empty(b, BLOCK_SIZE, dtype=torch.float32, device=device)
        self._y_bits = self.y.view(torch.int32)
        self._power = torch.empty_like(self.y)  # the power of two that sets the rounding step
        self._power_bits = self._power.view(torch.int32)

    def round_(self) -> None:
        """Ties to even; beyond 6 saturates; zeros come out as +0.0."""
        torch.bitwise_and(self._y_bits, _EXPONENT, out=self._power_bits)
        self._power_bits.clamp_(_BITS_OF_1, _BITS_OF_4)
        y = self.y.add_(self._power, alpha=_ROUNDER).sub_(self._power, alpha=_ROUNDER)
        y.clamp_(-E2M1_MAX, E2M1_MAX)


class _Packer:
    """Encodes rounded elements float32 [b, 16] into bytes [b, 8], under the signs that they had before rounding.

    Two elements share an int32, the even one in the low half (little-endian): magnitudes in bits 9-11 and 25-27, signs
    in bits 15 and 31. The byte wants them in bits 0-2 and 4-6, and 3 and 7; what lies above is cut off by the cast.
    """

    def __init__(self, b: int, device: torch.device) -> None:
        self._magnitudes = torch.empty(b, BLOCK_SIZE, dtype=torch.float16, device=device)
        self._signs = torch.empty_like(self._magnitudes)

    def keep_signs(self, y: Tensor) -> None:
        """Note the signs of ``y``; its minus zeros become plain ones, since they encode as code 0."""
        self._signs.copy_(y.add_(0.0))

    def pack(self, y: Tensor, out: Tensor) -> None:
        self._magnitudes.copy_(y * _TO_HALF_BITS)
        magnitudes = self._magnitudes.view(torch.int32).bitwise_and_(_PAIR_MAGNITUDES)
        signs = self._signs.view(torch.int32).bitwise_and_(_PAIR_SIGNS)
        byte = magnitudes >> 9
        byte |= magnitudes >> 21
        byte |= signs >> 12
        byte |= (signs >> 24) & 0x80
        out.copy_(byte)


def _scales(
    blocks: Tensor, amax: Tensor | None, chosen: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``blocks`` [B, 16], of a tensor with blocks in ``shape``: block scales E4M3 [B], what they multiply by
    float32 [B, 1], global scale [] or one per row."""
    block_amax = block_maxima(blocks) if chosen is None else chosen.detach().reshape(-1).clone()
    if amax is None:
        amax = block_amax.max() if len(blocks) else block_amax.new_zeros(())
    global_scale = global_scale_from_amax(amax)
    of_blocks = global_scale.expand(shape).reshape(-1) if global_scale.dim() else global_scale
    ideal = block_amax.div_(E2M1_MAX * of_blocks)
    ideal.masked_fill_(ideal == 0, 1.0).clamp_(E4M3_MIN_SUBNORMAL, E4M3_MAX)
    block_scales = ideal.to(torch.float8_e4m3fn)
    return block_scales, block_scales.float().mul_(of_blocks).unsqueeze(-1), global_scale


def block_maxima(blocks: Tensor) -> Tensor:
    """Largest magnitude of each of ``blocks`` [B, 16], float32 [B]."""
    bits = blocks.view(_BITS[blocks.dtype])
    out = torch.empty(len(bits), dtype=bits.dtype, device=bits.device)
    without_sign = torch.iinfo(bits.dtype).max
    for piece in pieces(len(bits), bits.device):
        torch.amax(bits[piece] & without_sign, -1, out=out[piece])
    return out.view(blocks.dtype).to(torch.float32, copy=True)


def pieces(blocks: int, device: torch.device) -> Iterator[slice]:
    """Cut ``blocks`` into ranges that are worked on one after another."""
    size = _BLOCKS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _BLOCKS_PER_LAUNCH
    return (slice(start, min(start + size, blocks)) for start in range(0, blocks, size))


def _byte_table(device: torch.device) -> Tensor:
    """int64 [256]: for every byte the two float32 values it holds, low nibble first, as 64 bits."""
    return torch.tensor(_BYTE_VALUES, dtype=torch.int64, device=device)
