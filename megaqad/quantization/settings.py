"""What a user says about quantization; a recipe file in ``conf/quantization`` fills these fields.

No torch here, so that a bad recipe is refused within milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import isfinite
from typing import Literal, get_args

from megaqad.errors import UserError
from megaqad.quantization.allocation import BF16_BITS, NVFP4_BITS
from megaqad.quantization.formats import CHOICES, FORMATS, KV_CACHE, WEIGHT_ONLY, LinearFormat, calibrates_cache

MISFITS = ("error", "keep")
Backend = Literal["emulated", "transformer_engine"]
CALIBRATIONS = ("max", "mse", "four_over_six")
WEIGHT_SCALES = ("refreshed", "frozen", "learned")
ACTIVATION_SCALES = ("static", "dynamic")
SCALE_LR = 1e-4
"""Of learned scales, unless ``scale_lr`` says otherwise: amax is in units of weights."""


@dataclass(frozen=True)
class QuantizationSettings:
    """Settings under ``quantization.``; a recipe file in ``conf/quantization`` fills them."""

    weights: str = "nvfp4"
    """Format of the weights of the chosen layers: ``nvfp4``, ``fp8``, ``mxfp8``, ``mxfp4``, or ``none``."""

    activations: str = "nvfp4"
    """Format of their inputs: the weights', or ``none``, which keeps them BF16 (weight-only, W4A16)."""

    include: list[str] = field(default_factory=lambda: ["*"])
    """Hugging Face module names to quantize, shell-style patterns."""

    exclude: list[str] = field(default_factory=lambda: ["lm_head"])
    """Module names to keep in BF16 although included."""

    formats: dict[str, str] = field(default_factory=dict)
    """Other formats for some of the chosen layers, by pattern; the last pattern that matches counts. ``bf16``,
    ``nvfp4``, ``nvfp4_weight_only``, ``fp8``, ``mxfp8``, ``mxfp4``. Layers 0 and 1 in BF16:
    ``{"model.layers.[01].*": bf16}``."""

    kv_cache: str = "none"
    """Format in which the engine keeps keys and values, and attention computes here: ``none`` (BF16), ``fp8``,
    ``nvfp4``, with scales from calibration; ``fp8_cast``, ``nvfp4_cast`` with a scale of 1, which engines take where an
    export holds none (ModelOpt's ``*_cast`` recipes): magnitudes up to 448 are kept, without calibration."""

    on_misfit: str = "error"
    """A layer whose inputs (of one rank) do not divide into the format's blocks: ``error``, or ``keep`` it in BF16."""

    backend: str = "emulated"
    """``emulated`` computes the NVFP4 function with BF16/FP32 GEMMs on any device; ``transformer_engine`` with NVFP4
    GEMMs on GPUs that have them (W4A4, compute capability 10.0 and above)."""

    activation_scales: str = "static"
    """Where the scales of NVFP4 and FP8 inputs come from: ``static``, calibration, as every engine reads them; or
    ``dynamic``, each token's own largest value, without calibration. The export then holds no input scales. Of the
    engines only TensorRT-LLM reads that, with one scale for all tokens of a call, which is each token's own where
    calls have one; vLLM 0.33 and SGLang take a missing scale for something else. The KV cache stays calibrated."""

    calibration_samples: int = 64
    """Training sequences whose activations set the input scales; all of them where there are fewer."""

    calibration: str = "max"
    """How NVFP4 weight scales are chosen: ``max``; ``mse``, the E4M3 scale of least squared error for each block;
    ``four_over_six``, each block's largest value as a 6 or as a 4 (arXiv 2512.02010)."""

    weight_scales: str = "refreshed"
    """``refreshed``: chosen again at every step, as weights train. ``frozen``: as calibration chose them; weights that
    outgrow them saturate. ``learned``: trained too (LSQ), from what calibration chose. A quantized lm_head is always
    refreshed."""

    scale_lr: float | None = None
    """Peak learning rate of learned scales; they have no weight decay. None is 1e-4."""

    activation_percentile: float = 100.0
    """Input scales cover this share of the magnitudes seen in calibration; the rest saturates."""

    auto: str | None = None
    """``bits:<average>``: which layer groups become FP8 or stay BF16, for the least KL at which the weights that the
    recipe quantizes average at most so many bits, block scales included (4.5 is all NVFP4). Measured once, then part of
    the run, and a recipe file for others: ``quantization=<output_dir>/auto.yaml``. Only BF16 is chosen beside NVFP4
    where FP8 would not do: it rounds inputs, which weight-only recipes do not; ``transformer_engine`` has none."""

    @property
    def target_bits(self) -> float | None:
        """Average bits per weight that ``auto`` asks for."""
        return None if self.auto is None else float(self.auto.removeprefix("bits:"))

    @property
    def auto_formats(self) -> tuple[str, ...]:
        """What ``auto`` may make of a layer besides the recipe's own format and BF16."""
        return ("fp8",) if self.activations != "none" and self.backend == "emulated" else ()

    def __post_init__(self) -> None:
        self._check_scales()
        for name, value, known in (
            ("weights", self.weights, (*FORMATS, "none")),
            ("activations", self.activations, (*FORMATS, "none")),
            ("kv_cache", self.kv_cache, KV_CACHE),
            ("on_misfit", self.on_misfit, MISFITS),
            ("backend", self.backend, get_args(Backend)),
            *((f"formats {pattern!r}", value, tuple(CHOICES)) for pattern, value in self.formats.items()),
        ):
            if value not in known:
                raise UserError(f"quantization.{name}={value} is unknown: {suggestion(value, known)}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.weights == "none" and self.activations != "none":
            raise UserError(
                f"quantization.activations={self.activations} with quantization.weights=none has no engine kernel: "
                "quantize the weights too, or neither (quantization=none)"
            )
        if self.activations == "none" and self.weights not in ("none", *WEIGHT_ONLY):
            raise UserError(
                f"quantization.weights={self.weights} with quantization.activations=none has no engine kernel: "
                f"set quantization.activations={self.weights}"
            )
        if self.activations not in ("none", self.weights):
            raise UserError(
                f"quantization.weights={self.weights} with quantization.activations={self.activations} has no engine "
                f"kernel: set quantization.activations={self.weights}"
            )
        if self.weights == "none" and (self.kv_cache != "none" or self.formats):
            name = "formats" if self.formats else f"kv_cache={self.kv_cache}"
            raise UserError(
                f"quantization.{name} has no effect with quantization.weights=none: set the weights' format"
            )
        for name in self.include:
            if name in self.exclude and not set(name) & set("*?["):
                raise UserError(f"quantization.include and quantization.exclude both list {name!r}: remove one")
        if self.auto is not None:
            self._check_auto(self.auto)
        if self.activation_scales == "dynamic":
            self._check_dynamic()
        calibrates = calibrates_cache(self.kv_cache) or self.activation_scales == "static"
        if self.calibration_samples < 1 and self.weights != "none" and calibrates:
            raise UserError(
                f"quantization.calibration_samples={self.calibration_samples} leaves the input scales unset: "
                "use 1 or more"
            )

    def _check_dynamic(self) -> None:
        formats = [LinearFormat(self.weights, self.activations), *(CHOICES[name] for name in self.formats.values())]
        if not any(chosen.has_input_scale for chosen in formats if chosen is not None):
            raise UserError(
                "quantization.activation_scales=dynamic has no effect: no inputs are in NVFP4 or FP8, the formats with "
                "a scale to choose; leave it out"
            )
        if self.activation_percentile < 100:
            raise UserError(
                f"quantization.activation_percentile={self.activation_percentile} is for calibrated scales, and "
                "quantization.activation_scales=dynamic has none: leave one out"
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
        if self.formats:
            raise UserError(f"quantization.auto={auto} chooses formats itself: remove quantization.formats, or auto")
        if not NVFP4_BITS <= bits < BF16_BITS:
            raise UserError(
                f"quantization.auto={auto} cannot be met: all NVFP4 is {NVFP4_BITS:g} bits, all BF16 {BF16_BITS:g} "
                "(which is quantization=none); give an average between"
            )

    def _check_scales(self) -> None:
        for name, value, choices in (
            ("calibration", self.calibration, CALIBRATIONS),
            ("weight_scales", self.weight_scales, WEIGHT_SCALES),
            ("activation_scales", self.activation_scales, ACTIVATION_SCALES),
        ):
            if value not in choices:
                raise UserError(f"quantization.{name}={value} is unknown: choose one of {', '.join(choices)}")
        if self.scale_lr is not None and (self.weight_scales != "learned" or self.weights == "none"):
            raise UserError(
                f"quantization.scale_lr={self.scale_lr} trains nothing: set quantization.weight_scales=learned, or "
                "leave it out"
            )
        if (self.calibration, self.weight_scales) != ("max", "refreshed") and self.weights not in ("nvfp4", "none"):
            raise UserError(
                f"quantization.calibration={self.calibration}, weight_scales={self.weight_scales} is for "
                f"NVFP4 weights, not quantization.weights={self.weights}: leave both out"
            )
        if self.scale_lr is not None and not self.scale_lr > 0:
            raise UserError(f"quantization.scale_lr={self.scale_lr} must be above 0, like 1e-4")
        if not 0 < self.activation_percentile <= 100:
            raise UserError(
                f"quantization.activation_percentile={self.activation_percentile} must be above 0 and at most 100"
            )


def suggestion(value: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all of them."""
    near = get_close_matches(value, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}choose one of {', '.join(known)}"
