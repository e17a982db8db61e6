"""The number formats that a layer may compute in: what must be known of each before torch is imported.

The arithmetic is in ``numbers.py``; here are the facts that recipes are checked with, and the names by which
``quantization.formats`` chooses. A name stands for what engines have a GEMM for, so weights and inputs go together.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatFacts:
    """One number format."""

    bits: float
    """Per weight, block scales included."""
    block: int
    """Values along the contraction dim that share a scale; that dim must be a multiple. 1: one scale per tensor."""
    calibrated: bool
    """Whether inputs need a scale from calibration; else their scales are powers of two from the input itself."""
    algorithm: str
    """ModelOpt's ``quant_algo``."""


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is quantized."""

    weights: str
    """A key of ``FORMATS``."""
    activations: str
    """The same, or ``none``: inputs stay BF16."""
    dynamic: bool = False
    """Whether inputs of a format that is else calibrated get their scales from themselves, one for each token."""

    @property
    def facts(self) -> FormatFacts:
        """Of the weights' format."""
        return FORMATS[self.weights]

    @property
    def algorithm(self) -> str:
        """ModelOpt's name of the whole."""
        return self.facts.algorithm if self.activations != "none" else WEIGHT_ONLY[self.weights]

    @property
    def calibrates_inputs(self) -> bool:
        """Whether calibration must find the largest input, and the export holds an input scale."""
        return not self.dynamic and self.has_input_scale

    @property
    def has_input_scale(self) -> bool:
        """Whether inputs have a float32 scale, calibrated or of each token: not the MX formats' powers of two."""
        return self.activations != "none" and FORMATS[self.activations].calibrated


FORMATS = {
    "nvfp4": FormatFacts(bits=4.5, block=16, calibrated=True, algorithm="NVFP4"),
    "fp8": FormatFacts(bits=8.0, block=1, calibrated=True, algorithm="FP8"),
    "mxfp8": FormatFacts(bits=8.25, block=32, calibrated=False, algorithm="MXFP8"),
    "mxfp4": FormatFacts(bits=4.25, block=32, calibrated=False, algorithm="mxfp4"),
}
"""By name. ``mxfp4`` is written in small letters because ModelOpt's exporter does so."""

WEIGHT_ONLY = {"nvfp4": "W4A16_NVFP4"}
"""Formats that engines also multiply with BF16 inputs, and ModelOpt's name of that."""

CHOICES: dict[str, LinearFormat | None] = {
    "bf16": None,
    **{name: LinearFormat(name, name) for name in FORMATS},
    **{f"{name}_weight_only": LinearFormat(name, "none") for name in WEIGHT_ONLY},
}
"""What a layer can be by name, in ``quantization.formats``."""

KV_CACHE = ("none", "fp8", "nvfp4", "fp8_cast", "nvfp4_cast")
"""Formats of the keys and values that engines keep. ``_cast``: under a scale of 1, which needs no calibration."""


def cache_number(kv_cache: str) -> str | None:
    """The key of ``FORMATS`` that a member of ``KV_CACHE`` is in."""
    return None if kv_cache == "none" else kv_cache.removesuffix("_cast")


def calibrates_cache(kv_cache: str) -> bool:
    """Whether calibration must find the largest key and value, and the export holds their scales."""
    return kv_cache in FORMATS
