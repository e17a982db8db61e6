"""The NVFP4 number format: one definition, bit for bit what checkpoints hold and engines read."""

from megaqad.nvfp4.api import Impl, dequantize, fake_quantize, fake_quantize_packed, quantize, row_amax
from megaqad.nvfp4.calibration import METHODS, choose_scales
from megaqad.nvfp4.format import (
    BLOCK_SIZE,
    NVFP4Tensor,
    check_finite,
    global_scale_from_amax,
    tensor_amax,
)
from megaqad.nvfp4.straight_through import straight_through

__all__ = [
    "BLOCK_SIZE",
    "METHODS",
    "Impl",
    "NVFP4Tensor",
    "check_finite",
    "choose_scales",
    "dequantize",
    "fake_quantize",
    "fake_quantize_packed",
    "global_scale_from_amax",
    "quantize",
    "row_amax",
    "straight_through",
    "tensor_amax",
]
