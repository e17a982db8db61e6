"""The plan of a quantized model: module name -> format, from a recipe's patterns.

A recipe says nothing about Megatron's layers or about sharding. Its patterns are shell-style (``fnmatch``) and are
matched against full Hugging Face module names such as ``model.layers.3.self_attn.q_proj``. A module is quantized
when an include pattern matches and no exclude pattern does; ``formats`` then gives some of these another format, the
last pattern that matches. Modules that engines fuse into one GEMM (q/k/v, gate/up) share one global scale, and the
experts of a layer are one grouped GEMM, so a recipe that treats these differently is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.weights import Weight
from megaqad.nvfp4.calibration import Method
from megaqad.quantization.formats import CHOICES, FORMATS, LinearFormat, cache_number, calibrates_cache
from megaqad.quantization.scales import Scaling
from megaqad.quantization.settings import QuantizationSettings

ENGINES_AND_HEADS = (
    "{head} is quantized, which few engines read: vLLM 0.22 refuses its scales, what was merged since reads them for "
    "Qwen3.5, Qwen3.6 and Nemotron-H (vllm-project/vllm#42124); try yours before training, or keep it in BF16: "
    "quantization.exclude=[{head}]"
)
"""As of November 2026."""


@dataclass(frozen=True)
class QuantizationPlan:
    """What is quantized and how; the same on every rank."""

    settings: QuantizationSettings
    modules: tuple[str, ...]
    """Every linear module of the model, the head the last, in model order."""
    formats: Mapping[str, LinearFormat]
    """Of the quantized ones, in model order; others stay BF16."""
    misfits: tuple[str, ...] = ()
    """Modules kept in BF16 only because they do not divide into blocks."""
    note: str | None = None
    """What a user should know before serving the model."""
    rounds_activations: bool = True
    """False in ``weights_alone``: activations and the KV cache are left as they are."""

    @property
    def enabled(self) -> bool:
        """Whether anything is to be quantized."""
        return self.settings.weights != "none"

    @property
    def unquantized(self) -> list[str]:
        """The linear modules kept in BF16, in model order."""
        return [name for name in self.modules if name not in self.formats]

    @property
    def kv_cache(self) -> str:
        """A member of ``KV_CACHE``."""
        return self.settings.kv_cache

    @property
    def scaling(self) -> Scaling:
        """How the scales of layers come about."""
        settings = self.settings
        return Scaling(
            calibration=cast(Method, settings.calibration),
            weight_scales=settings.weight_scales,
            activation_percentile=settings.activation_percentile,
        )

    @property
    def needs_data(self) -> bool:
        """Whether scales come from calibration data: of the inputs of any layer, or of the KV cache."""
        return calibrates_cache(self.kv_cache) or any(chosen.calibrates_inputs for chosen in self.formats.values())

    @property
    def is_smooth(self) -> bool:
        """Whether only weights are rounded, so that a small difference in an activation stays small."""
        return self.kv_cache == "none" and all(chosen.activations == "none" for chosen in self.formats.values())

    def format_of(self, weight: Weight) -> LinearFormat | None:
        """Format of the linear layer that has this weight; None keeps it BF16."""
        return self.formats.get(weight.modules[0])

    def named(self, name: str) -> LinearFormat | None:
        """A member of ``CHOICES`` with input scales as this recipe takes them."""
        return named_format(self.settings, name)

    def weights_alone(self) -> "QuantizationPlan":
        """The same weights; activations and the KV cache left alone."""
        alone = {name: replace(chosen, activations="none", dynamic=False) for name, chosen in self.formats.items()}
        return replace(self, formats=alone, rounds_activations=False)


def plan_for(settings: QuantizationSettings, architecture: Architecture, tensor: int = 1) -> QuantizationPlan:
    """A recipe resolved against one model, every layer of it checked.

    Args:
        tensor: ranks among which each layer is divided; row-parallel layers must divide into whole blocks there.

    Raises:
        UserError: a pattern that matches nothing, a choice that splits what engines fuse, a layer that does not divide
            into blocks, a tied head, or nothing left to quantize.
    """
    modules = (*architecture.linear_modules, architecture.head)
    formats = choose_formats(settings, modules, architecture.router_modules)
    misfits: list[str] = []
    for weights in _together([*architecture.linears, architecture.head_weight]):
        chosen = _common_format(formats, weights)
        problem = None if chosen is None else _misfit(weights[0], chosen, tensor)
        if problem is not None and settings.on_misfit == "error":
            raise UserError(f"{problem}: exclude it, set quantization.on_misfit=keep, or another parallel.tensor")
        if problem is not None:
            misfits += [module for weight in weights for module in weight.modules]
    if architecture.tied_embeddings and architecture.head in formats:
        raise UserError(
            f"{architecture.head} shares its weight with the embedding in this model, which engines look up in BF16: "
            f"add '{architecture.head}' to quantization.exclude"
        )
    _check_cache(settings, architecture)
    _check_experts(settings, architecture, formats)
    kept = {name: chosen for name, chosen in formats.items() if name not in set(misfits)}
    if settings.weights != "none" and not kept:
        raise UserError("the recipe quantizes no module: widen quantization.include, or say quantization=none")
    note = ENGINES_AND_HEADS.format(head=architecture.head) if architecture.head in kept else None
    return QuantizationPlan(settings, modules, kept, tuple(misfits), note)


def choose_formats(
    settings: QuantizationSettings, modules: Iterable[str], others: Iterable[str] = ()
) -> dict[str, LinearFormat]:
    """The format of every module that the patterns quantize, in order.

    Args:
        modules: names of every linear module, the head included.
        others: names of modules that stay BF16 whatever a recipe says (routers); patterns may name them.

    Raises:
        UserError: a pattern that matches no module, or a format for modules that are not quantized.
    """
    linear = tuple(modules)
    known = {*linear, *others}
    for key, patterns in (
        ("include", settings.include),
        ("exclude", settings.exclude),
        ("formats", settings.formats),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(
                    f"quantization.{key} pattern {pattern!r} matches no linear module of this model; "
                    f"its modules are named like {linear[0]!r} and {linear[-1]!r}"
                )
    if settings.weights == "none":
        return {}
    included = [name for name in linear if _matches(name, settings.include) and not _matches(name, settings.exclude)]
    for pattern in settings.formats:
        if not any(fnmatchcase(name, pattern) for name in included):
            raise UserError(
                f"quantization.formats pattern {pattern!r} matches only modules that include and exclude leave in "
                "BF16: include them too"
            )
    usual = own_format(settings.weights, settings.activations)
    chosen = {name: named_format(settings, _last_match(name, settings.formats) or usual) for name in included}
    return {name: found for name, found in chosen.items() if found is not None}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _last_match(name: str, formats: Mapping[str, str]) -> str | None:
    return next((other for pattern, other in reversed(list(formats.items())) if fnmatchcase(name, pattern)), None)


def named_format(settings: QuantizationSettings, name: str) -> LinearFormat | None:
    """A member of ``CHOICES`` with input scales as the recipe takes them."""
    chosen = CHOICES[name]
    if chosen is None or settings.activation_scales == "static" or not chosen.has_input_scale:
        return chosen
    return replace(chosen, dynamic=True)


def own_format(weights: str, activations: str) -> str:
    """The member of ``CHOICES`` that a recipe's ``weights``, which are quantized, and ``activations`` are."""
    wanted = LinearFormat(weights, activations)
    return next(name for name, known in CHOICES.items() if known == wanted)


def _named(chosen: LinearFormat | None) -> str:
    """A format as ``quantization.formats`` would call it."""
    return "bf16" if chosen is None else own_format(chosen.weights, chosen.activations)


def _together(linears: Iterable[Weight]) -> list[list[Weight]]:
    """Weights that are one parameter: a layer's experts, else each by itself."""
    groups: dict[tuple[int | None, str], list[Weight]] = {}
    for weight in linears:
        groups.setdefault((weight.layer, weight.name), []).append(weight)
    return list(groups.values())


def _common_format(formats: Mapping[str, LinearFormat], weights: Iterable[Weight]) -> LinearFormat | None:
    """The format of what one GEMM multiplies."""
    first, *others = (module for weight in weights for module in weight.modules)
    wanted = formats.get(first)
    for name in others:
        found = formats.get(name)
        if found != wanted:
            raise UserError(
                f"the recipe keeps {first} in {_named(wanted)} but {name} in {_named(found)}; engines fuse them "
                "into one GEMM, so treat them alike, together in one pattern"
            )
    return wanted


def _misfit(weight: Weight, chosen: LinearFormat, tensor: int) -> str | None:
    """Why a layer does not divide into blocks, None if it does."""
    inputs = weight.inputs(tensor)
    if inputs % chosen.facts.block == 0:
        return None
    cut = f" on each of parallel.tensor={tensor} ranks" if weight.row_parallel and tensor > 1 else ""
    return (
        f"{weight.modules[0]} sums over {inputs} inputs{cut}, not a multiple of {chosen.facts.block}, the block of "
        f"{chosen.weights}"
    )


def _check_cache(settings: QuantizationSettings, architecture: Architecture) -> None:
    kv_cache, block = settings.kv_cache, FORMATS["nvfp4"].block
    for attention in architecture.attentions:
        if cache_number(kv_cache) == "nvfp4" and attention.head_dim % block:
            raise UserError(
                f"quantization.kv_cache={kv_cache} needs heads of a multiple of {block}, this model's head_dim is "
                f"{attention.head_dim}: set quantization.kv_cache={kv_cache.replace('nvfp4', 'fp8')}"
            )


def _check_experts(
    settings: QuantizationSettings, architecture: Architecture, formats: Mapping[str, LinearFormat]
) -> None:
    """What the experts of a layer, one site, do not have."""
    experts = [weight.modules[0] for weight in architecture.linears if weight.expert is not None]
    if not any(name in formats for name in experts):
        return
    for name, value, allowed in (
        ("weight_scales", settings.weight_scales, "refreshed"),
        ("activation_percentile", settings.activation_percentile, 100.0),
        ("backend", settings.backend, "emulated"),
    ):
        if value != allowed:
            raise UserError(
                f"quantization.{name}={value} is not supported for experts: set quantization.{name}={allowed}, or "
                "leave them in BF16 with quantization.exclude=['*.experts.*']"
            )
