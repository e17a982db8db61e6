"""What a user says about quantization; a recipe file in ``conf/quantization`` fills these fields.

No torch here, so that a bad recipe is refused within milliseconds.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from megaqad.errors import UserError
from megaqad.quantization.allocation import BF16_BITS, NVFP4_BITS

Format = Literal["nvfp4", "none"]
Backend = Literal["emulated", "transformer_engine"]


@dataclass(frozen=True)
class QuantizationSettings:
    """Settings under ``quantization.``; a recipe file in ``conf/quantization`` fills them."""

    weights: str = "nvfp4"
    """Format of the weights of the chosen layers."""

    activations: str = "nvfp4"
    """Format of their inputs. ``none`` keeps them BF16 (weight-only, W4A16)."""

    include: list[str] = field(default_factory=lambda: ["*"])
    """Hugging Face module names to quantize, shell-style patterns."""

    exclude: list[str] = field(default_factory=lambda: ["lm_head"])
    """Module names to keep in BF16 although included."""

    backend: str = "emulated"
    """``emulated`` computes the NVFP4 function with BF16/FP32 GEMMs on any device; ``transformer_engine`` with NVFP4
    GEMMs on GPUs that have them (W4A4, compute capability 10.0 and above)."""

    calibration_samples: int = 64
    """Training sequences whose activations set the input scales."""

    auto: str | None = None
    """``bits:<average>``: keep those layer groups BF16 that cost the most KL, so that the weights the recipe quantizes
    average at most so many bits, block scales included (4.5 is all NVFP4). Measured once, then part of the run."""

    @property
    def target_bits(self) -> float | None:
        """Average bits per weight that ``auto`` asks for."""
        return None if self.auto is None else float(self.auto.removeprefix("bits:"))

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("activations", self.activations)):
            if value not in get_args(Format):
                raise UserError(f"quantization.{name}={value} is unknown: choose one of {', '.join(get_args(Format))}")
        if self.backend not in get_args(Backend):
            raise UserError(
                f"quantization.backend={self.backend} is unknown: choose one of {', '.join(get_args(Backend))}"
            )
        if self.weights == "none" and self.activations != "none":
            raise UserError(
                f"quantization.activations={self.activations} with quantization.weights=none has no engine kernel: "
                "quantize the weights too, or neither (quantization=none)"
            )
        if self.auto is not None:
            self._check_auto(self.auto)
        if self.calibration_samples < 1 and self.activations != "none":
            raise UserError(
                f"quantization.calibration_samples={self.calibration_samples} leaves the input scales unset: "
                "use 1 or more"
            )

    def _check_auto(self, auto: str) -> None:
        kind, _, target = auto.partition(":")
        try:
            bits = float(target)
        except ValueError:
            bits = float("nan")
        if kind != "bits" or not isfinite(bits):
            raise UserError(f"quantization.auto={auto} is not understood: give bits:<average>, like bits:6")
        if self.weights != "nvfp4":
            raise UserError(
                f"quantization.auto={auto} chooses among NVFP4 layers, but quantization.weights={self.weights}"
            )
        if not NVFP4_BITS <= bits < BF16_BITS:
            raise UserError(
                f"quantization.auto={auto} cannot be met: all NVFP4 is {NVFP4_BITS:g} bits, all BF16 {BF16_BITS:g} "
                "(which is quantization=none); give an average between"
            )
