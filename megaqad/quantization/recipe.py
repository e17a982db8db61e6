"""Recipes: which linear layers are quantized and how, by pattern on Hugging Face module names.

A recipe says nothing about Megatron's layers or about sharding. Its patterns are shell-style (``fnmatch``) and are
matched against full Hugging Face module names such as ``model.layers.3.self_attn.q_proj``. A module is quantized
when an include pattern matches and no exclude pattern does; ``formats`` then gives some of these another format, the
last pattern that matches. Modules that engines fuse into one GEMM (q/k/v, gate/up) share one global scale, so a recipe
that treats them differently is refused. No torch here.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from fnmatch import fnmatchcase

from megaqad.errors import UserError
from megaqad.models.description import ModelDescription
from megaqad.models.rows import LinearSite, contraction_sizes, head_site, linear_modules, linear_sites
from megaqad.quantization.formats import CHOICES, FORMATS, LinearFormat, cache_number, calibrates_cache
from megaqad.quantization.settings import QuantizationSettings

HEAD = "lm_head"


class Recipe:
    """The settings' patterns, resolved against the modules of one model."""

    def __init__(self, settings: QuantizationSettings, hf_modules: Iterable[str]) -> None:
        """
        Args:
            settings: the recipe.
            hf_modules: names of every linear module of the model, ``lm_head`` included.

        Raises:
            UserError: a pattern that matches no module, or a format for modules that are not quantized.
        """
        self.settings = settings
        self.modules = tuple(hf_modules)
        self.enabled = settings.weights != "none"
        self.rounds_activations = True
        """False in ``weights_alone``: activations and the KV cache are left as they are."""
        for key, patterns in (
            ("include", settings.include),
            ("exclude", settings.exclude),
            ("formats", settings.formats),
        ):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in self.modules):
                    raise UserError(
                        f"quantization.{key} pattern {pattern!r} matches no linear module of this model; "
                        f"its modules are named like {self.modules[0]!r} and {self.modules[-1]!r}"
                    )
        self._formats = {name: self._choose(name) for name in self.modules if self._is_included(name)}
        for pattern in settings.formats:
            if not any(fnmatchcase(name, pattern) for name in self._formats):
                raise UserError(
                    f"quantization.formats pattern {pattern!r} matches only modules that include and exclude leave in "
                    "BF16: include them too"
                )

    def _is_included(self, hf_module: str) -> bool:
        return (
            self.enabled
            and any(fnmatchcase(hf_module, pattern) for pattern in self.settings.include)
            and not any(fnmatchcase(hf_module, pattern) for pattern in self.settings.exclude)
        )

    def _choose(self, hf_module: str) -> LinearFormat | None:
        name = own_format(self.settings.weights, self.settings.activations)
        for pattern, other in self.settings.formats.items():
            if fnmatchcase(hf_module, pattern):
                name = other
        return self.named(name)

    def named(self, name: str) -> LinearFormat | None:
        """A member of ``CHOICES`` with input scales as this recipe takes them."""
        chosen = CHOICES[name]
        if chosen is None or self.settings.activation_scales == "static" or not chosen.has_input_scale:
            return chosen
        return replace(chosen, dynamic=True)

    def module_format(self, hf_module: str) -> LinearFormat | None:
        """Format of one module; None keeps it BF16."""
        return self._formats.get(hf_module)

    def selects(self, hf_module: str) -> bool:
        """Whether the recipe quantizes this module."""
        return self.module_format(hf_module) is not None

    def format_of(self, hf_modules: tuple[str, ...]) -> LinearFormat | None:
        """Format of the layer that holds ``hf_modules`` fused; None keeps it BF16.

        Raises:
            UserError: the recipe wants the fused modules in different formats.
        """
        first, *others = hf_modules
        wanted = self.module_format(first)
        for name in others:
            found = self.module_format(name)
            if found != wanted:
                raise UserError(
                    f"the recipe keeps {first} in {_named(wanted)} but {name} in {_named(found)}; engines fuse them "
                    "into one GEMM with one global scale, so treat them alike, together in one pattern"
                )
        return wanted

    def quantized_modules(self) -> list[str]:
        """Names of the quantized modules, in model order."""
        return [name for name in self.modules if self.selects(name)]

    def unquantized_modules(self) -> list[str]:
        """Names of the linear modules kept in BF16, in model order."""
        return [name for name in self.modules if not self.selects(name)]

    @property
    def formats(self) -> dict[str, LinearFormat]:
        """Of the quantized modules, in model order."""
        return {name: chosen for name, chosen in self._formats.items() if chosen is not None}

    @property
    def kv_cache(self) -> str:
        """A member of ``KV_CACHE``."""
        return self.settings.kv_cache

    @property
    def needs_data(self) -> bool:
        """Whether scales come from calibration data: of the inputs of any layer, or of the KV cache."""
        return calibrates_cache(self.kv_cache) or any(chosen.calibrates_inputs for chosen in self.formats.values())

    @property
    def is_smooth(self) -> bool:
        """Whether only weights are rounded, so that a small difference in an activation stays small."""
        return self.kv_cache == "none" and all(chosen.activations == "none" for chosen in self.formats.values())

    def weights_alone(self) -> "Recipe":
        """The same weights; activations and the KV cache left alone."""
        other = copy(self)
        other.rounds_activations = False
        other._formats = {
            name: None if chosen is None else replace(chosen, activations="none", dynamic=False)
            for name, chosen in self._formats.items()
        }
        return other

    def keep(self, hf_modules: Iterable[str]) -> None:
        """Leave these modules in BF16 after all."""
        for name in hf_modules:
            self._formats[name] = None


def own_format(weights: str, activations: str) -> str:
    """The member of ``CHOICES`` that a recipe's ``weights``, which are quantized, and ``activations`` are."""
    wanted = LinearFormat(weights, activations)
    return next(name for name, known in CHOICES.items() if known == wanted)


def _named(chosen: LinearFormat | None) -> str:
    """A format as ``quantization.formats`` would call it."""
    return "bf16" if chosen is None else own_format(chosen.weights, chosen.activations)


def recipe_for(settings: QuantizationSettings, description: ModelDescription, tensor: int = 1) -> Recipe:
    """The recipe resolved against one model, every layer of it checked.

    Args:
        tensor: ranks among which each layer is divided; row-parallel layers must divide into whole blocks there.

    Raises:
        UserError: a pattern that matches nothing, a choice that splits what engines fuse, a layer that does not divide
            into blocks, a tied head, or nothing left to quantize.
    """
    recipe = Recipe(settings, [*linear_modules(description), HEAD])
    sizes = contraction_sizes(description, tensor)
    sites = [site for layer in range(description.num_layers) for site in linear_sites(description, layer).values()]
    for site in [*sites, head_site(description)]:
        _fit(recipe, site, sizes, tensor)
    if description.tied_embeddings and recipe.selects(HEAD):
        raise UserError(
            "lm_head shares its weight with the embedding in this model, which engines look up in BF16: "
            "add 'lm_head' to quantization.exclude"
        )
    if cache_number(recipe.kv_cache) == "nvfp4" and description.head_dim % FORMATS["nvfp4"].block:
        raise UserError(
            f"quantization.kv_cache={recipe.kv_cache} needs heads of a multiple of 16, this model's head_dim is "
            f"{description.head_dim}: set quantization.kv_cache={recipe.kv_cache.replace('nvfp4', 'fp8')}"
        )
    if recipe.enabled and not recipe.quantized_modules():
        raise UserError("the recipe quantizes no module: widen quantization.include, or say quantization=none")
    return recipe


def _fit(recipe: Recipe, site: LinearSite, sizes: Mapping[str, int], tensor: int) -> None:
    """Refuse a layer that does not divide into blocks, or leave it in BF16 where the recipe says so."""
    chosen, name = recipe.format_of(site.hf_modules), site.hf_modules[0]
    if chosen is None or sizes[name] % chosen.facts.block == 0:
        return
    if recipe.settings.on_misfit == "keep":
        recipe.keep(site.hf_modules)
        return
    cut = f" on each of parallel.tensor={tensor} ranks" if site.parallel == "row" and tensor > 1 else ""
    raise UserError(
        f"{name} sums over {sizes[name]} inputs{cut}, not a multiple of {chosen.facts.block}, the block of "
        f"{chosen.weights}: exclude it, set quantization.on_misfit=keep, or another parallel.tensor"
    )


def misfits(recipe: Recipe) -> list[str]:
    """Modules kept in BF16 only because they do not divide into blocks, in model order."""
    asked = Recipe(recipe.settings, recipe.modules)
    return [name for name in recipe.modules if asked.selects(name) and not recipe.selects(name)]
