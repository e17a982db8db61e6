"""Which tensors are quantized, with which numbers, and the linear layers that compute with them.

``recipe.py`` reads patterns on Hugging Face module names, ``layers.py`` holds the emulated NVFP4 linear layers,
``state.py`` keeps their quantizers: calibration, the once-per-step weight quantization, the error per layer.
"""

from megaqad.quantization.layers import NVFP4ColumnParallelLinear, NVFP4RowParallelLinear, QuantizerMode
from megaqad.quantization.recipe import LinearFormat, QuantizationSettings, Recipe
from megaqad.quantization.state import (
    calibrate,
    input_amaxes,
    linear_for,
    quantization_errors,
    quantized_linears,
    refresh_weights,
    set_mode,
)

__all__ = [
    "LinearFormat",
    "NVFP4ColumnParallelLinear",
    "NVFP4RowParallelLinear",
    "QuantizationSettings",
    "QuantizerMode",
    "Recipe",
    "calibrate",
    "input_amaxes",
    "linear_for",
    "quantization_errors",
    "quantized_linears",
    "refresh_weights",
    "set_mode",
]
