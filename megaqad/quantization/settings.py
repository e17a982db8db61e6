"""What a user says about quantization; a recipe file in ``conf/quantization`` fills these fields.

No torch here, so that a bad recipe is refused within milliseconds.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from megaqad.errors import UserError

Format = Literal["nvfp4", "none"]
Backend = Literal["emulated"]
CALIBRATIONS = ("max", "mse", "four_over_six")
WEIGHT_SCALES = ("refreshed", "frozen", "learned")
SCALE_LR = 1e-4
"""Of learned scales, unless ``scale_lr`` says otherwise: amax is in units of weights."""


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
    """``emulated`` computes the NVFP4 function with BF16/FP32 GEMMs on any device."""

    calibration_samples: int = 64
    """Training sequences whose activations set the input scales."""

    calibration: str = "max"
    """How NVFP4 weight scales are chosen: ``max``; ``mse``, the E4M3 scale of least squared error for each block;
    ``four_over_six``, each block's largest value as a 6 or as a 4 (arXiv 2512.02010)."""

    weight_scales: str = "refreshed"
    """``refreshed``: chosen again at every step, as weights train. ``frozen``: as calibration chose them; weights that
    outgrow them saturate. ``learned``: trained too (LSQ), from what calibration chose."""

    scale_lr: float | None = None
    """Peak learning rate of learned scales; they have no weight decay. None is 1e-4."""

    activation_percentile: float = 100.0
    """Input scales cover this share of the magnitudes seen in calibration; the rest saturates."""

    def __post_init__(self) -> None:
        self._check_scales()
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
        if self.calibration_samples < 1 and self.activations != "none":
            raise UserError(
                f"quantization.calibration_samples={self.calibration_samples} leaves the input scales unset: "
                "use 1 or more"
            )

    def _check_scales(self) -> None:
        for name, value, choices in (
            ("calibration", self.calibration, CALIBRATIONS),
            ("weight_scales", self.weight_scales, WEIGHT_SCALES),
        ):
            if value not in choices:
                raise UserError(f"quantization.{name}={value} is unknown: choose one of {', '.join(choices)}")
        if self.scale_lr is not None and (self.weight_scales != "learned" or self.weights == "none"):
            raise UserError(
                f"quantization.scale_lr={self.scale_lr} trains nothing: set quantization.weight_scales=learned, or "
                "leave it out"
            )
        if self.scale_lr is not None and not self.scale_lr > 0:
            raise UserError(f"quantization.scale_lr={self.scale_lr} must be above 0, like 1e-4")
        if not 0 < self.activation_percentile <= 100:
            raise UserError(
                f"quantization.activation_percentile={self.activation_percentile} must be above 0 and at most 100"
            )
