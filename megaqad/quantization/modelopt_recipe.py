"""ModelOpt's recipe files as recipes here: ``quantization=general/ptq/nvfp4_default-kv_fp8``, or a YAML file.

ModelOpt's own loader reads the file, imports and all. Its rules name quantizers by pattern, in order, each replacing
what earlier ones said; they are asked here about every quantizer of this model, and the answers are written down as a
recipe. What cannot be done is refused by name, never left out.

Importing the loader takes seconds, so it happens only for such a recipe.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.quantization.formats import CHOICES, LinearFormat
from megaqad.quantization.settings import QuantizationSettings, suggestion

DONE_HERE: dict[str, tuple[Any, ...]] = {
    "axis": (None,),
    "backend": (None,),
    "bias": (None,),
    "calibrator": ("max",),
    "constant_amax": (None,),
    "fake_quant": (True,),
    "learn_amax": (False,),
    "narrow_range": (False,),
    "pass_through_bwd": (True,),
    "rotate": (False, {}),
    "unsigned": (False,),
    "use_constant_amax": (False,),
}
"""Values of a quantizer's keys that mean what is done here; others are refused."""
ONE_SCALE = "use_constant_amax"
"""Pins the amax to 448 without calibration; for keys and values, where it is a scale of 1, ``kv_cache=*_cast``."""


def is_modelopt_recipe(name: str) -> bool:
    """Whether ``quantization=<name>`` means one of ModelOpt's recipes, or a file."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def translate(name: str, base: QuantizationSettings, architecture: Architecture) -> QuantizationSettings:
    """The recipe ``name`` for one model.

    Args:
        base: gives what a ModelOpt recipe does not say: backend, calibration, misfits.

    Raises:
        UserError: no such recipe, ModelOpt is not installed, or something in it cannot be done; the key is named.
    """
    content = _load(name)
    rules = content.get("quantize", {}).get("quant_cfg")
    if rules is None:
        kind = content.get("metadata", {}).get("recipe_type", "unknown")
        raise UserError(f"quantization={name}: recipe_type {kind} has no quantize.quant_cfg; give a PTQ recipe")
    algorithm = content["quantize"].get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    if method not in (None, "max"):
        instead = "; take its max counterpart with quantization.calibration=mse" if method == "mse" else ""
        raise UserError(f"quantization={name}: quantize.algorithm={method} is not supported, only max{instead}")
    quantizers = _Quantizers(name, rules)
    chosen = {module: quantizers.linear(module) for module in [*architecture.linear_modules, architecture.head]}
    caches = {quantizers.cache(attention.module) for attention in architecture.attentions}
    if len(caches) > 1:
        raise UserError(f"quantization={name}: layers keep keys and values in {sorted(caches)}; give all layers one")
    if all(choice == "bf16" for choice in chosen.values()):
        raise UserError(
            f"quantization={name} quantizes no linear module of this model: its patterns are for other layers, like "
            "experts; choose another recipe"
        )
    return _as_settings(base, chosen, caches.pop() if caches else "none")


def _as_settings(base: QuantizationSettings, chosen: Mapping[str, str], kv_cache: str) -> QuantizationSettings:
    """The most frequent format for all, the others by name."""
    usual = Counter(choice for choice in chosen.values() if choice != "bf16").most_common(1)[0][0]
    numbers = CHOICES[usual]
    assert numbers is not None
    return replace(
        base,
        weights=numbers.weights,
        activations=numbers.activations,
        include=["*"],
        exclude=[module for module, choice in chosen.items() if choice == "bf16"],
        formats={module: choice for module, choice in chosen.items() if choice not in ("bf16", usual)},
        kv_cache=kv_cache,
    )


def _load(name: str) -> dict[str, Any]:
    """The recipe with its imports resolved."""
    if find_spec("modelopt") is None:
        raise UserError(f"quantization={name} is a ModelOpt recipe: pip install nvidia-modelopt to read it")
    known = _shipped()
    if not Path(name).is_file() and name.removesuffix(".yaml") not in known:
        raise UserError(f"quantization={name} is neither a file nor a recipe of ModelOpt: {_nearest(name, known)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.recipe import load_recipe

        try:
            content: dict[str, Any] = load_recipe(name).model_dump()
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"quantization={name} cannot be read by ModelOpt ({first}); correct the file") from error
    return content


def _shipped() -> list[str]:
    """Names of the recipes in the installed package."""
    spec = find_spec("modelopt_recipes")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0])
    folders = ("general", "huggingface", "models")
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for part in folders for path in (root / part).rglob("*.yaml")
    )


def _nearest(name: str, known: Sequence[str]) -> str:
    meant = suggestion(name, known)
    return meant.split("?")[0] + "?" if meant.startswith("did you mean") else "its recipes lie in modelopt_recipes/"


class _Quantizers:
    """What the rules say of each quantizer."""

    def __init__(self, recipe: str, rules: Sequence[Mapping[str, Any]]) -> None:
        self._recipe = recipe
        self._rules = rules

    def linear(self, module: str) -> str:
        """A key of ``CHOICES``."""
        self._must_be_off(f"{module}.output_quantizer")
        weights, inputs = (self._number(f"{module}.{kind}_quantizer") for kind in ("weight", "input"))
        if weights is None and inputs is None:
            return "bf16"
        wanted = LinearFormat(weights or "none", inputs or "none")
        found = next((name for name, known in CHOICES.items() if known == wanted), None)
        if wanted == LinearFormat("mxfp4", "none"):
            raise UserError(
                f"quantization={self._recipe}: {module} in MXFP4 with BF16 inputs is not supported: ModelOpt's export "
                "calls it mxfp4, as it does MXFP4 with MXFP4 inputs, so no reader could tell whether to round inputs"
            )
        if found is None:
            raise UserError(
                f"quantization={self._recipe}: {module} in weights={wanted.weights}, "
                f"inputs={wanted.activations} is not supported: a layer can be {', '.join(CHOICES)}"
            )
        return found

    def cache(self, attention: str) -> str:
        """A member of ``KV_CACHE``."""
        for kind in ("q_bmm", "softmax", "bmm2_output"):
            self._must_be_off(f"{attention}.{kind}_quantizer")
        names = [f"{attention}.{kind}_bmm_quantizer" for kind in ("k", "v")]
        key, value = ((self._number(name, ONE_SCALE), self._has_one_scale(name)) for name in names)
        if key != value or key[0] not in (None, "fp8", "nvfp4"):
            raise UserError(
                f"quantization={self._recipe}: keys in {key[0]} and values in {value[0]} are not supported: both fp8 "
                "or nvfp4, with scales of one kind"
            )
        number, cast = key
        return "none" if number is None else f"{number}_cast" if cast else number

    def _has_one_scale(self, quantizer: str) -> bool:
        """Whether it is a cast: under the amax 448, a scale of 1."""
        rule = self._rule(quantizer)
        return rule is not None and isinstance(rule[1], Mapping) and bool(rule[1].get(ONE_SCALE))

    def _must_be_off(self, quantizer: str) -> None:
        if self._rule(quantizer) is not None:
            raise UserError(f"quantization={self._recipe}: {quantizer.rpartition('.')[2]} is not supported; disable it")

    def _rule(self, quantizer: str) -> tuple[str, Any] | None:
        """(pattern, cfg) that hold for a quantizer, None when it is off."""
        pattern, cfg, enabled = "", None, False
        for rule in self._rules:
            if rule.get("parent_class") not in (None, "nn.Linear") or not fnmatchcase(
                quantizer, rule["quantizer_name"]
            ):
                continue
            enabled = bool(rule.get("enable", True))
            if rule.get("cfg") is not None:
                pattern, cfg = rule["quantizer_name"], rule["cfg"]
        return (pattern, cfg) if enabled else None

    def _number(self, quantizer: str, *allowed_here: str) -> str | None:
        """The format's name. ``allowed_here``: keys of ``DONE_HERE`` that may have any value."""
        rule = self._rule(quantizer)
        if rule is None:
            return None
        pattern, cfg = rule
        where = f"quantization={self._recipe}: quant_cfg {pattern!r}"
        if not isinstance(cfg, Mapping):
            raise UserError(f"{where} has several quantizers in sequence or none; give one format")
        for key, allowed in DONE_HERE.items():
            if key in cfg and cfg[key] not in allowed and key not in allowed_here:
                raise UserError(f"{where} has {key}={cfg[key]}, which is not supported; remove it")
        bits, blocks = cfg.get("num_bits"), dict(cfg.get("block_sizes") or {})
        bits = tuple(bits) if isinstance(bits, list | tuple) else bits
        if bits not in ((2, 1), (4, 3)):
            raise UserError(f"{where} has num_bits={bits}, which is not supported: (2, 1) and (4, 3) are")
        scale_bits = tuple(blocks.pop("scale_bits", None) or ())
        if blocks.pop("type", "static" if blocks == {} else None) == "static" and blocks:
            raise UserError(f"{where} has block_sizes.type=static, which is not supported; use dynamic")
        sizes = {int(dim): size for dim, size in blocks.items() if size is not None}
        known: dict[tuple[Any, ...], str] = {
            ((2, 1), 16, (4, 3)): "nvfp4",
            ((2, 1), 32, (8, 0)): "mxfp4",
            ((4, 3), 32, (8, 0)): "mxfp8",
            ((4, 3), None, ()): "fp8",
        }
        found = known.get((bits, sizes.get(-1), scale_bits)) if set(sizes) <= {-1} else None
        if found is None:
            raise UserError(
                f"{where} has num_bits={bits}, block_sizes={sizes or None}, which is not supported: NVFP4, FP8 per "
                "tensor, MXFP8 and MXFP4 are"
            )
        return found
