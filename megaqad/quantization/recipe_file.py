"""Recipes in files of one's own: ``quantization=<file.yaml>`` with the keys of ``QuantizationSettings``.

``conf/quantization`` holds such files under short names; ``quantization.auto`` leaves one behind. ModelOpt's recipes
are YAML files too, of another schema (``modelopt_recipe.py``). No torch.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from megaqad.errors import UserError
from megaqad.quantization.settings import QuantizationSettings, suggestion

OF_MODELOPT = ("imports", "metadata", "quantize")
"""Keys of a ModelOpt recipe."""
NOT_OF_A_RECIPE = ("auto", "backend")
"""Settings that are not written: what chose the recipe, and the hardware that it ran on."""


def own_recipe(name: str) -> dict[str, Any] | None:
    """The settings in the file that ``quantization=<name>`` is; None when it is none with this project's keys.

    Raises:
        UserError: not a YAML mapping, a key that comes twice, or one that is no setting.
    """
    if not name.endswith((".yaml", ".yml")) or not Path(name).is_file():
        return None
    content, known = _content(name), [field.name for field in fields(QuantizationSettings)]
    if any(key in OF_MODELOPT for key in content):
        return None
    for key in content:
        if key not in known:
            raise UserError(f"quantization={name} has {key}, which is no setting of a recipe: {suggestion(key, known)}")
    return content


def _content(name: str) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(name))  # unlike PyYAML it refuses a key that comes twice
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"quantization={name} cannot be read ({' '.join(str(error).split())}): correct it") from error
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(f"quantization={name} holds no settings: write lines like `weights: nvfp4`")
    return {str(key): value for key, value in content.items()}


def recipe_text(settings: QuantizationSettings, title: str) -> str:
    """A recipe as a file; ``title``: one line on it."""
    content = {key: value for key, value in asdict(settings).items() if key not in NOT_OF_A_RECIPE}
    return f"# {title}\n" + yaml.safe_dump(content, sort_keys=False)
