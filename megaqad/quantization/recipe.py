"""Recipes: which linear layers are quantized and how, by pattern on Hugging Face module names.

A recipe says nothing about Megatron's layers or about sharding. Its patterns are shell-style (``fnmatch``) and are
matched against full Hugging Face module names such as ``model.layers.3.self_attn.q_proj``. A module is quantized
when an include pattern matches and no exclude pattern does. Modules that engines fuse into one GEMM (q/k/v, gate/up)
share one global scale, so a recipe that treats them differently is refused. No torch here.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from megaqad.errors import UserError
from megaqad.models.description import ModelDescription
from megaqad.models.families import linear_modules, linear_sites
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.settings import QuantizationSettings


class Recipe:
    """The settings' patterns, resolved against the modules of one model."""

    def __init__(self, settings: QuantizationSettings, hf_modules: Iterable[str]) -> None:
        """
        Args:
            settings: the recipe.
            hf_modules: names of every linear module of the model, ``lm_head`` included.

        Raises:
            UserError: a pattern that matches no module, or a module that cannot be quantized.
        """
        self.settings = settings
        self.modules = tuple(hf_modules)
        self.enabled = settings.weights != "none"
        for key, patterns in (("include", settings.include), ("exclude", settings.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in self.modules):
                    raise UserError(
                        f"quantization.{key} pattern {pattern!r} matches no linear module of this model; "
                        f"its modules are named like {self.modules[0]!r} and {self.modules[-1]!r}"
                    )
        if self.enabled and self.selects("lm_head"):
            raise UserError("quantization of lm_head is not supported: add 'lm_head' to quantization.exclude")

    def selects(self, hf_module: str) -> bool:
        """Whether the recipe quantizes this module."""
        return (
            self.enabled
            and any(fnmatchcase(hf_module, pattern) for pattern in self.settings.include)
            and not any(fnmatchcase(hf_module, pattern) for pattern in self.settings.exclude)
        )

    def format_of(self, hf_modules: tuple[str, ...]) -> LinearFormat | None:
        """Format of the layer that holds ``hf_modules`` fused; None keeps it BF16.

        Raises:
            UserError: the recipe wants some of the fused modules quantized and others not.
        """
        chosen = [name for name in hf_modules if self.selects(name)]
        if not chosen:
            return None
        if len(chosen) != len(hf_modules):
            kept = next(name for name in hf_modules if name not in chosen)
            raise UserError(
                f"the recipe quantizes {chosen[0]} but not {kept}; engines fuse them into one GEMM with one global "
                "scale, so include or exclude them together"
            )
        return LinearFormat(self.settings.weights, self.settings.activations)

    def quantized_modules(self) -> list[str]:
        """Names of the quantized modules, in model order."""
        return [name for name in self.modules if self.selects(name)]

    def unquantized_modules(self) -> list[str]:
        """Names of the linear modules kept in BF16, in model order."""
        return [name for name in self.modules if not self.selects(name)]


def recipe_for(settings: QuantizationSettings, description: ModelDescription) -> Recipe:
    """The recipe resolved against one model, every layer of it checked.

    Raises:
        UserError: a pattern that matches nothing, a choice that splits what engines fuse, or nothing left to quantize.
    """
    recipe = Recipe(settings, [*linear_modules(description), "lm_head"])
    for layer in range(description.num_layers):
        for site in linear_sites(description, layer).values():
            recipe.format_of(site.hf_modules)
    if recipe.enabled and not recipe.quantized_modules():
        raise UserError("the recipe quantizes no module: widen quantization.include, or say quantization=none")
    return recipe
