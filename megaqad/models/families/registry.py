"""From a checkpoint's config.json to the description of its model.

What transformers makes of the file is the truth: engines and the original training read it so. Its configuration class
fills in what the file leaves out and settles which of several spellings counts (``rope_scaling`` beside
``rope_parameters``); families read the result. No code of the checkpoint's own is run.
"""

import copy
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture

MOST_LAYERS = 10_000
"""More is a damaged file, not a model."""
NEEDED_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
"""Null in the file stands for the default of the class."""


@dataclass(frozen=True)
class Family:
    """How one class of transformers is read."""

    architecture: str
    """Its name in config.json's ``architectures``, like ``LlamaForCausalLM``."""
    model_type: str
    """Its ``model_type`` there."""
    read: Callable[[Any, dict[str, Any]], Architecture]
    """(transformers' configuration, config.json as it is) -> description. Raises UserError or ValueError for what
    would change the model's function and is not implemented."""


_FAMILIES: dict[str, Family] = {}


def family(
    architecture: str, model_type: str
) -> Callable[[Callable[[Any, dict[str, Any]], Architecture]], Callable[[Any, dict[str, Any]], Architecture]]:
    """Register the decorated function as the reader of a family."""

    def register(
        read: Callable[[Any, dict[str, Any]], Architecture],
    ) -> Callable[[Any, dict[str, Any]], Architecture]:
        _FAMILIES[model_type] = Family(architecture, model_type, read)
        return read

    return register


def families() -> dict[str, Family]:
    """Everything that can be read, by ``model_type``; the files of this package register themselves here."""
    package = importlib.import_module("megaqad.models.families")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _FAMILIES


def describe_model(model_dir: Path) -> Architecture:
    """The model in ``model_dir``, from its config.json and nothing else.

    Raises:
        UserError: no such file, not JSON, an unknown architecture, or a setting that would change the model's function
            and is not implemented.
    """
    path = Path(model_dir) / "config.json"
    content = _read(path)
    found = _family_of(content, path)
    parsed = _parse(content, found, path)
    try:
        architecture = found.read(parsed, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} describes no model ({error!r}): restore the original file") from error
    return architecture


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; model must be a directory with a Hugging Face checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from the original checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; restore it from the original checkpoint")
    return content


def _family_of(content: dict[str, Any], path: Path) -> Family:
    """By ``model_type``, as transformers does; by ``architectures`` where that is missing. Engines go by the latter, so
    a file in which the two contradict each other is refused."""
    known = families()
    named = content.get("architectures") or []
    named = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    model_type = content.get("model_type")
    if model_type is None:
        model_type = next((one.model_type for one in known.values() if one.architecture in named), None)
    found = known.get(model_type) if isinstance(model_type, str) else None
    if found is None or any(name.lower() != found.architecture.lower() for name in named):
        what = ", ".join(named) or f"model_type={model_type!r}"
        supported = ", ".join(sorted(one.architecture for one in known.values()))
        raise UserError(
            f"{path.parent}: architecture {what} is not supported; choose a checkpoint of one of: {supported}; or add "
            'its family (README, "Adding a family")'
        )
    return found


def _parse(content: dict[str, Any], found: Family, path: Path) -> Any:
    """transformers' configuration of this file."""
    from transformers import CONFIG_MAPPING

    for key in (*NEEDED_SIZES, *OPTIONAL_SIZES):
        value = content.get(key, 1)  # left out: the class default
        if value is None and key in OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{path.parent}: config.json has {key}={value!r}; it must be a positive integer")
    if content.get("num_hidden_layers", 1) > MOST_LAYERS:
        raise UserError(f"{path} has num_hidden_layers={content['num_hidden_layers']}: restore the original file")
    if content.get("is_causal") is False:
        raise UserError(f"{path} has is_causal=false; only causal attention is supported")
    plain = copy.deepcopy({key: value for key, value in content.items() if key != "quantization_config"})
    try:
        parsed = CONFIG_MAPPING[found.model_type].from_dict(plain)
    except Exception as error:  # its validators raise classes of their own
        why = " ".join(str(error).split())
        raise UserError(f"{path} is refused by transformers ({why}): restore the original file") from error
    if vars(parsed).get("head_dim", 0) is None:  # the equal share, which not every class puts in its place
        parsed.head_dim = parsed.hidden_size // parsed.num_attention_heads
    return parsed
