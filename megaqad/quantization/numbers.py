"""The arithmetic of every number format behind one small interface; NVFP4 itself is ``megaqad.nvfp4``.

    fp8     E4M3 elements, one float32 scale per tensor: amax / 448
    mxfp8   E4M3 elements, one power of two (E8M0) per 32 neighbours along the contraction dim (OCP MX 1.0)
    mxfp4   E2M1 elements, scales as mxfp8's

A format does two things. ``quantize_weight`` makes the tensors that the checkpoint holds, byte for byte those that
ModelOpt 0.47 writes, and ``dequantize_weight`` reads them; ``round_weight`` is one after the other and is what training
computes with. ``round_input`` is what the engine's kernel makes of an input, with a straight-through gradient.

Weights and inputs round apart in two places, because their producers do. ModelOpt divides a BF16 weight by the FP8
scale in BF16, so the quotient is rounded twice, where kernels divide in FP32; and its MXFP4 weights send ties towards
zero, where kernels send them to the even mantissa.

The exponent of an MX block is ``ceil(log2(amax / largest element))``: nothing saturates. It is taken from the bits of
the float32 quotient, not from ``log2``, which is off by one next to a power of two on some devices.
"""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor

from megaqad import nvfp4
from megaqad.nvfp4.format import E2M1_MAX, E2M1_VALUES, E4M3_MAX, MIN_GLOBAL_SCALE
from megaqad.nvfp4.reference import decode_e2m1, decode_e8m0, encode_e2m1, unpack_e2m1
from megaqad.quantization.formats import FORMATS

EXPORT_DTYPE = torch.bfloat16
"""Of the checkpoint before it is quantized: weights are rounded to it first, also in FP32 runs."""

Packed = dict[str, Tensor]
"""Tensors of a quantized weight by their ending in the checkpoint: ``weight``, ``weight_scale``, .."""


class NumberFormat(ABC):
    """One format. Every method is local: under a common ``amax`` the parts of a tensor, cut at multiples of the block,
    give the parts of the result."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.block = FORMATS[name].block

    @abstractmethod
    def quantize_weight(self, weight: Tensor, amax: Tensor) -> Packed:
        """``weight`` [N, K] BF16 as the checkpoint holds it. ``amax``: float32 [], of the whole tensor and of those
        that engines fuse with it; formats with scales of their own per block take no notice of it."""

    @abstractmethod
    def dequantize_weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The values of ``quantize_weight``'s result: computed in FP32, rounded once to ``dtype``."""

    @abstractmethod
    def input_values(self, x: Tensor, amax: Tensor) -> Tensor:
        """``x`` [.., K] as the kernel multiplies it, in its own dtype. ``amax``: float32 [], calibrated, or [.., 1], of
        each token."""

    @torch.no_grad()
    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """``weight`` [N, K], rounded to BF16 first, after its trip through the checkpoint; in its own dtype."""
        return self.dequantize_weight(self.quantize_weight(weight.detach().to(EXPORT_DTYPE), amax), weight.dtype)

    def round_input(self, x: Tensor, amax: Tensor) -> Tensor:
        """``input_values`` with the gradient passed straight through, also where a value saturated."""
        with torch.no_grad():
            values = self.input_values(x, amax)
        return nvfp4.straight_through(x, values) if torch.is_grad_enabled() and x.requires_grad else values


class NVFP4(NumberFormat):
    """``megaqad.nvfp4``, its fast paths included."""

    def quantize_weight(self, weight: Tensor, amax: Tensor) -> Packed:
        q = nvfp4.quantize(weight, amax)
        return {"weight": q.codes, "weight_scale": q.block_scales, "weight_scale_2": q.global_scale}

    def dequantize_weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        parts = (packed["weight"], packed["weight_scale"], packed["weight_scale_2"])
        return nvfp4.dequantize(nvfp4.NVFP4Tensor(*parts), dtype)

    @torch.no_grad()
    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        return nvfp4.fake_quantize(weight.detach().to(EXPORT_DTYPE).to(weight.dtype), amax)

    def input_values(self, x: Tensor, amax: Tensor) -> Tensor:
        return nvfp4.fake_quantize(x, amax)


def fp8_scale(amax: Tensor) -> Tensor:
    """The scale ``amax / 448``, float32 in the shape of ``amax``, never below ``MIN_GLOBAL_SCALE``."""
    return (amax.float() / torch.full_like(amax, E4M3_MAX, dtype=torch.float32)).clamp_min(MIN_GLOBAL_SCALE)


def _e4m3(x: Tensor) -> Tensor:
    """``x`` in E4M3, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


class FP8(NumberFormat):
    """E4M3 under one scale per tensor."""

    def quantize_weight(self, weight: Tensor, amax: Tensor) -> Packed:
        scale = fp8_scale(amax)
        quotient = (weight.float() / scale).to(weight.dtype)  # ModelOpt's weight is BF16 between division and cast
        return {"weight": _e4m3(quotient), "weight_scale": scale}

    def dequantize_weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return (packed["weight"].float() * packed["weight_scale"]).to(dtype)

    def input_values(self, x: Tensor, amax: Tensor) -> Tensor:
        scale = fp8_scale(amax)
        return (_e4m3(x.float() / scale).float() * scale).to(x.dtype)


def e8m0_exponents(blocks: Tensor, largest: float) -> Tensor:
    """Biased exponents uint8 [.., B] of float32 ``blocks`` [.., B, 32]: the least power of two, from 2^-127 to 2^127,
    by which no element exceeds ``largest``; 2^-127 for a block of zeros."""
    amax = blocks.abs().amax(-1)
    quotient = amax / torch.full_like(amax, largest)
    mantissa, exponent = torch.frexp(quotient)  # mantissa in [0.5, 1)
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(quotient == 0, 0, (ceiling + 127).clamp(0, 254)).to(torch.uint8)


class _Microscaled(NumberFormat):
    """Blocks of 32 under a power of two."""

    largest: float

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [.., K] over its blocks' scales, float32 [.., B, 32], and the biased exponents [.., B]."""
        blocks = x.float().unflatten(-1, (-1, self.block))
        exponents = e8m0_exponents(blocks, self.largest)
        return torch.ldexp(blocks, 127 - exponents.int().unsqueeze(-1)), exponents

    def _values(self, scaled: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded elements [.., B, 32] times their scales, [.., K]."""
        return (scaled * decode_e8m0(exponents).unsqueeze(-1)).flatten(-2).to(dtype)


class MXFP8(_Microscaled):
    """E4M3 elements."""

    largest = E4M3_MAX

    def quantize_weight(self, weight: Tensor, amax: Tensor) -> Packed:
        scaled, exponents = self._scaled(weight)
        return {"weight": _e4m3(scaled).flatten(-2), "weight_scale": exponents}

    def dequantize_weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return self._values(packed["weight"].float().unflatten(-1, (-1, self.block)), packed["weight_scale"], dtype)

    def input_values(self, x: Tensor, amax: Tensor) -> Tensor:
        scaled, exponents = self._scaled(x)
        return self._values(_e4m3(scaled).float(), exponents, x.dtype)


class MXFP4(_Microscaled):
    """E2M1 elements, two per byte, the even one in the low nibble."""

    largest = E2M1_MAX

    def quantize_weight(self, weight: Tensor, amax: Tensor) -> Packed:
        scaled, exponents = self._scaled(weight)
        midpoints = [(low + high) / 2 for low, high in pairwise(E2M1_VALUES)]
        bounds = torch.tensor(midpoints, dtype=torch.float32, device=weight.device)
        magnitude = torch.bucketize(scaled.abs(), bounds)  # how many midpoints lie below: ties go towards zero
        codes = (magnitude + 8 * ~(scaled > 0)).flatten(-2).to(torch.uint8)  # ModelOpt's zero carries the sign bit
        return {"weight": codes[..., 0::2] | (codes[..., 1::2] << 4), "weight_scale": exponents}

    def dequantize_weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        values = unpack_e2m1(packed["weight"]).unflatten(-1, (-1, self.block))
        return self._values(values, packed["weight_scale"], dtype)

    def input_values(self, x: Tensor, amax: Tensor) -> Tensor:
        scaled, exponents = self._scaled(x)
        return self._values(decode_e2m1(encode_e2m1(scaled)), exponents, x.dtype)


_FORMATS: dict[str, NumberFormat] = {
    "nvfp4": NVFP4("nvfp4"),
    "fp8": FP8("fp8"),
    "mxfp8": MXFP8("mxfp8"),
    "mxfp4": MXFP4("mxfp4"),
}


def number_format(name: str) -> NumberFormat:
    """The arithmetic of a format of ``formats.FORMATS``."""
    return _FORMATS[name]
