"""What the golden fixtures cover: model x recipe x layout x dtype x export format.

The full product would take hours. Each value of an axis stands in several rows beside different values of the others,
and each layout meets several recipes and models, so that a change of results in any of them shows in some row.
"""

from dataclasses import dataclass, field

from tests.models.checkpoints import CASES as MODELS

RECIPES: dict[str, tuple[str, ...]] = {
    "none": ("quantization=none",),
    "nvfp4": ("quantization=nvfp4",),
    "weight_only": ("quantization=nvfp4_weight_only",),
    "attention_bf16": ("quantization=nvfp4_attention_bf16",),
    "first_layers_bf16": ("quantization=nvfp4_first_layers_bf16",),
    "kv_fp8": ("quantization=nvfp4_kv_fp8",),
    "fp8_attention": ("quantization=nvfp4_mixed_fp8_attention",),
    "fp8": ("quantization=fp8",),
    "mxfp8": ("quantization=mxfp8",),
    "mxfp4": ("quantization=mxfp4",),
    "modelopt": ("quantization=general/ptq/nvfp4_default-kv_fp8",),
    "mix": (
        "quantization=nvfp4",
        'quantization.formats={"*.self_attn.*": fp8, "*.0.mlp.*": nvfp4_weight_only, "*.3.*": bf16}',
    ),
    "mxfp8_misfit": ("quantization=mxfp8", "quantization.on_misfit=keep"),
    "auto": ("quantization=nvfp4", "quantization.auto=bits:6"),
    "head": ("quantization=nvfp4", "quantization.exclude=[]"),
    "fp8_head": ("quantization=fp8", "quantization.exclude=[]"),
    "kv_nvfp4": ("quantization=nvfp4", "quantization.kv_cache=nvfp4"),
    "kv_fp8_cast": ("quantization=nvfp4", "quantization.kv_cache=fp8_cast"),
    "kv_nvfp4_cast": ("quantization=nvfp4_weight_only", "quantization.kv_cache=nvfp4_cast"),
    "percentile": ("quantization=nvfp4", "quantization.activation_percentile=99"),
    "dynamic": ("quantization=nvfp4", "quantization.activation_scales=dynamic"),
    "fp8_dynamic": ("quantization=fp8", "quantization.activation_scales=dynamic"),
    "mse": ("quantization=nvfp4", "quantization.calibration=mse"),
    "four_over_six": ("quantization=nvfp4_weight_only", "quantization.calibration=four_over_six"),
    "four_over_six_head": (
        "quantization=nvfp4",
        "quantization.calibration=four_over_six",
        "quantization.exclude=[]",
    ),
    "frozen": ("quantization=nvfp4", "quantization.calibration=mse", "quantization.weight_scales=frozen"),
    "learned": ("quantization=nvfp4", "quantization.weight_scales=learned"),
    "mse_learned": (
        "quantization=nvfp4_weight_only",
        "quantization.calibration=mse",
        "quantization.weight_scales=learned",
        "quantization.scale_lr=1e-3",
    ),
}
"""Overrides by the name of a recipe."""

LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp1": (),
    "tp2": ("parallel.tensor=2",),
    "tp2sp": ("parallel.tensor=2", "parallel.sequence=true"),
    "tp3": ("parallel.tensor=3",),
    "pp2": ("parallel.pipeline=2",),
    "pp2v2": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "dp2": ("parallel.data=2",),
    "tp2pp2": ("parallel.tensor=2", "parallel.pipeline=2"),
}
"""Overrides by the name of a layout of ranks."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""``runtime.dtype``, and the checkpoint's, by its short name."""

FORMATS = {"mo": "modelopt", "ct": "compressed_tensors"}
"""``export.format`` by its short name."""


@dataclass(frozen=True)
class Case:
    """One run from checkpoint to export."""

    model: str
    recipe: str
    layout: str
    dtype: str
    export: str
    extra: tuple[str, ...] = ()
    """Other overrides, of every command."""
    resumed_in: str | None = None
    """Layout in which training resumes from its middle checkpoint, and in which later commands run."""
    variant: str = ""
    """What sets the case apart from others with the same axes, for its name."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        axes = (self.model, self.recipe, self.layout, self.dtype, self.export)
        for value, known in zip(axes, (MODELS, RECIPES, LAYOUTS, DTYPES, FORMATS), strict=True):
            assert value in known, f"{value} is none of {', '.join(known)}"
        object.__setattr__(self, "name", "-".join((*axes, *filter(None, (self.variant,)))))

    def overrides(self, layout: str | None = None) -> list[str]:
        """Of the axes and ``extra``, in the case's layout or another."""
        return [
            *RECIPES[self.recipe],
            *LAYOUTS[layout or self.layout],
            f"runtime.dtype={DTYPES[self.dtype]}",
            f"export.format={FORMATS[self.export]}",
            *self.extra,
        ]


_ALL = (
    Case("llama", "nvfp4", "tp1", "fp32", "mo", extra=("report.sensitivity=true",)),
    Case("llama", "nvfp4", "tp2", "fp32", "ct"),
    Case("llama", "nvfp4", "tp2sp", "bf16", "mo"),
    Case("llama", "nvfp4", "pp2", "bf16", "ct"),
    Case("llama", "nvfp4", "pp2v2", "fp32", "mo"),
    Case("llama", "nvfp4", "dp2", "fp32", "mo"),
    Case("llama", "nvfp4", "tp2pp2", "bf16", "mo"),
    Case("llama", "head", "tp2", "fp32", "mo"),
    Case("llama", "fp8_head", "pp2", "fp32", "ct"),
    Case("llama", "mse", "pp2", "fp32", "ct"),
    Case("llama", "mix", "tp2sp", "fp32", "mo"),
    Case("llama", "mse_learned", "tp1", "bf16", "mo"),
    Case("llama", "percentile", "dp2", "bf16", "ct"),
    Case("llama", "fp8", "tp2pp2", "fp32", "ct"),
    Case("llama_tied_scaled", "weight_only", "tp1", "fp32", "mo"),
    Case("llama_tied_scaled", "weight_only", "pp2v2", "bf16", "ct"),
    Case("llama_tied_scaled", "four_over_six", "tp2", "fp32", "mo"),
    Case("llama_tied_scaled", "kv_fp8", "tp2sp", "bf16", "mo"),
    Case("llama_tied_scaled", "dynamic", "dp2", "fp32", "mo"),
    Case("llama_tied_scaled", "first_layers_bf16", "pp2", "fp32", "mo"),
    Case("llama_three_groups", "nvfp4", "pp2", "fp32", "mo"),
    Case("llama_three_groups", "fp8", "tp1", "bf16", "mo"),
    Case("llama_three_groups", "kv_nvfp4", "dp2", "fp32", "mo"),
    Case("llama_three_groups", "learned", "tp3", "fp32", "ct"),
    Case("mistral", "attention_bf16", "tp2", "bf16", "mo"),
    Case("mistral", "frozen", "pp2v2", "fp32", "mo"),
    Case("mistral", "kv_nvfp4_cast", "tp1", "fp32", "mo"),
    Case("mistral", "auto", "tp2", "fp32", "mo"),
    Case("mistral", "fp8_dynamic", "pp2", "bf16", "ct"),
    Case("qwen2", "nvfp4", "tp2", "fp32", "mo", extra=("report.sensitivity=true",)),
    Case("qwen2", "fp8_attention", "tp1", "bf16", "ct"),
    Case("qwen2", "weight_only", "tp2pp2", "fp32", "mo"),
    Case("qwen2", "kv_fp8_cast", "pp2", "fp32", "ct"),
    Case("qwen2", "mxfp8_misfit", "tp2", "fp32", "mo"),
    Case("qwen3", "nvfp4", "pp2v2", "bf16", "mo"),
    Case("qwen3", "kv_nvfp4", "tp2sp", "fp32", "mo"),
    Case("qwen3", "four_over_six_head", "tp1", "bf16", "ct"),
    Case("qwen3", "modelopt", "tp1", "fp32", "mo"),
    Case("mxfp_llama", "mxfp8", "tp2", "fp32", "mo"),
    Case("mxfp_llama", "mxfp4", "tp2sp", "bf16", "mo"),
    Case("mxfp_llama", "mxfp4", "pp2", "fp32", "ct"),
    Case("mxfp_llama", "mxfp8", "dp2", "bf16", "ct"),
    # what else reaches into the models: objectives, teachers, frozen weights, recomputation, other layouts later on
    Case("llama", "none", "tp1", "fp32", "mo", extra=("distill.objective=qat",), variant="qat"),
    Case("qwen3", "none", "tp2", "bf16", "mo", extra=("distill.objective=qat",), variant="qat"),
    Case(
        *("qwen2", "nvfp4", "tp2", "fp32", "mo"),
        extra=("distill.teacher=self", "train.trainable=['model.layers.*.mlp.*']"),
        variant="self",
    ),
    Case(
        *("llama_three_groups", "learned", "pp2", "fp32", "mo"),
        extra=("distill.teacher=self", "train.trainable=[scales]"),
        variant="scales",
    ),
    Case(
        *("qwen3", "weight_only", "pp2v2", "fp32", "mo"),
        extra=("distill.hidden.weight=0.5", "train.recompute=true"),
        variant="hidden",
    ),
    Case("llama", "learned", "tp2", "fp32", "mo", resumed_in="pp2v2", variant="moved"),
    Case("mistral", "kv_fp8", "pp2", "fp32", "ct", resumed_in="dp2", variant="moved"),
)
CASES = {case.name: case for case in _ALL}
assert len(CASES) == len(_ALL)
