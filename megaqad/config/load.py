"""From ``conf/`` and the overrides of the command line to ``Settings``, by Hydra.

Three things stand before Hydra's grammar: paths are quoted for it, ``data=<path>`` is short for the text group, and
``quantization=`` takes files and ModelOpt's recipes beside the names in ``conf/quantization``.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megaqad.config.settings import Settings
from megaqad.errors import UserError
from megaqad.models.families import describe_model
from megaqad.quantization.modelopt_recipe import is_modelopt_recipe, translate
from megaqad.quantization.recipe_file import own_recipe
from megaqad.quantization.settings import suggestion

PATH_SETTINGS = ("model", "output_dir", "tokens", "student", "distill.teacher", "distill.cache")
MADE_BY_RECIPE = tuple(
    f"quantization.{name}" for name in ("weights", "activations", "include", "exclude", "formats", "kv_cache")
)
"""Settings that a ModelOpt recipe makes."""
RECIPE_FILE = "recipe_file"
"""Name in Hydra's group ``quantization`` of the recipe file that the command line gives."""
_QUOTED_KEY = re.compile(r"""(["'])(.+?)\1\s*:""")
NOT_FOR_USERS = ("full_key:", "object_type=", "reference_type=", "See ", "To append to your config")
"""Beginnings of lines in Hydra's messages that help nobody here; the last one repeats the value, a secret perhaps."""


def conf_dir() -> Path:
    """The Hydra configuration: inside the installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def check_form(overrides: Sequence[str]) -> None:
    """Refuse what is no ``key=value``, and settings that are given twice: neither can be what was meant.

    Raises:
        UserError: the first of them, with the right form.
    """
    given: dict[str, str] = {}
    for place, override in enumerate(overrides):
        key, separator, value = override.partition("=")
        if key.startswith("-") or not (separator or key.startswith("~")):
            following = next(iter(overrides[place + 1 : place + 2]), "")
            value = value or (
                "<value>" if not following or "=" in following or following.startswith("-") else following
            )
            raise UserError(f"{override} is no setting: settings are written key=value, like {key.lstrip('-')}={value}")
        name = key.lstrip("+")
        if given.get(name, override) != override:
            raise UserError(f"{name} is given twice, {given[name]} and {override}: leave one of them out")
        given[name] = override


def load_settings(overrides: Sequence[str]) -> Settings:
    """Compose ``conf/config.yaml`` with ``key=value`` overrides into typed settings.

    Of two overrides for one key the last counts. ``data=<file, directory or glob>`` is short for ``data=text
    data.files=[...]``. ``~`` in a path is the home directory.

    Raises:
        UserError: an unknown key or group, a value of the wrong type, a required setting missing.
    """
    schema = _schema()
    for override in overrides:
        _check_shape(override, schema)
    ConfigStore.instance().store(name="settings", node=schema)
    recipe, overrides = _without_modelopt_recipe([_with_recipe_file(override) for override in overrides])
    expanded = [part for override in overrides for part in _plain_paths(override)]
    try:
        with initialize_config_dir(config_dir=str(conf_dir().resolve()), version_base="1.3"):
            composed = compose(config_name="config", overrides=expanded)
        for key in PATH_SETTINGS:
            path = OmegaConf.select(composed, key)
            OmegaConf.update(composed, key, path and os.path.expanduser(path))
        settings = OmegaConf.to_object(composed)
    except OverrideParseException as error:
        key, _, value = str(error.override).partition("=")
        raise UserError(f"{key}={value} cannot be read: a value with other signs is quoted, \"{key}='...'\"") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    except FrozenInstanceError as error:  # ``+group.name=`` has added what the settings do not have
        name = str(error).rpartition("field ")[2]
        raise UserError(f"{name} is no setting (megaqad <command> --help lists the settings)") from error
    assert isinstance(settings, Settings)
    return settings if recipe is None else _with_modelopt_recipe(settings, recipe)


def _check_shape(override: str, schema: DictConfig) -> None:
    """Refuse one value for a list, a mapping or a group, and several for one, in words of our own."""
    key, _, value = override.partition("=")
    key, groups = key.lstrip("+"), [path.name for path in conf_dir().iterdir() if path.is_dir()]
    if key in (*groups, *PATH_SETTINGS) or value.startswith(("[", "{", "'", '"')):
        return
    setting = OmegaConf.select(schema, key)
    if isinstance(setting, ListConfig):
        raise UserError(f"{override}: this setting is a list, written {key}=[{value}]")
    if isinstance(setting, DictConfig) and OmegaConf.get_type(setting) is dict:
        raise UserError(f"{override}: this setting is a mapping, written {key}={{name: value}}")
    if isinstance(setting, DictConfig):
        members = ", ".join(f"{key}.{name!s}" for name in setting)
        raise UserError(f"{override}: {key} is a group of settings, given one by one: {members}")
    if "," in value:
        raise UserError(f"{override}: this setting takes one value; launch/sweep.sh runs a command for each of several")


def _with_recipe_file(override: str) -> str:
    """``quantization=<file>`` by the name under which Hydra then knows the file; other overrides as they are."""
    key, _, value = override.partition("=")
    recipe = own_recipe(os.path.expanduser(value)) if key == "quantization" else None
    if recipe is None:
        return override
    ConfigStore.instance().store(group="quantization", name=RECIPE_FILE, node=recipe)
    return f"quantization={RECIPE_FILE}"


def _without_modelopt_recipe(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The ModelOpt recipe that ``quantization=`` names, and the overrides with ``none`` in its place.

    Raises:
        UserError: a recipe that does not exist, or settings beside a ModelOpt recipe that it makes itself.
    """
    recipes = sorted(path.stem for path in (conf_dir() / "quantization").glob("*.yaml"))
    found, kept = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "quantization":
            found = value if is_modelopt_recipe(value) else None
            if found is None and value not in (*recipes, RECIPE_FILE):
                raise UserError(f"quantization={value} is no recipe: {suggestion(value, recipes)}")
        kept.append("quantization=none" if key == "quantization" and found is not None else override)
    made = [override for override in kept if override.partition("=")[0] in MADE_BY_RECIPE]
    if found is not None and made:
        raise UserError(f"{made[0]} beside quantization={found}, which says that itself: change a copy of the file")
    return found, kept


def _with_modelopt_recipe(settings: Settings, recipe: str) -> Settings:
    if not settings.model:
        raise UserError("model is not set: give model=<directory>")
    translated = translate(recipe, settings.quantization, describe_model(settings.model_dir))
    return replace(settings, quantization=translated)


def _schema() -> DictConfig:
    """The typed schema that Hydra fills. OmegaConf makes frozen dataclasses read-only: undone until they are built."""
    schema = OmegaConf.structured(Settings)
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        OmegaConf.set_readonly(node, False)
        children = [node._get_node(key) for key in node]
        nodes += [child for child in children if isinstance(child, DictConfig)]
    assert isinstance(schema, DictConfig)
    OmegaConf.set_struct(schema.distill.loss, False)  # its keys are the user's choice, checked by ``DistillSettings``
    return schema


def _plain_paths(override: str) -> list[str]:
    """Quote paths for Hydra's grammar, and turn ``data=<path>`` into the text group with that path."""
    key, separator, value = override.partition("=")
    if not separator or value.startswith(("'", '"')):
        return [override]
    quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if key in PATH_SETTINGS and value not in ("", "null"):
        return [f"{key}={quoted}"]
    if key == "quantization.formats":
        # Patterns are keys that no schema lists, hence ++. Hydra takes no quotes around keys, but escaped brackets.
        return [f"++{key}=" + _QUOTED_KEY.sub(lambda found: re.sub(r"([\[\]])", r"\\\1", found[2]) + ":", value)]
    groups = {path.stem for path in (conf_dir() / "data").glob("*.yaml")}
    if key != "data" or value in groups:
        return [override]
    if not value.strip():
        raise UserError(f"data= is empty: give a file, a directory, a glob, or one of {', '.join(sorted(groups))}")
    return ["data=text", f"data.files=[{quoted}]"]


def _one_line(error: BaseException) -> str:
    """What a Hydra error and its cause say, without the context lines."""
    said: list[str] = []
    while error is not None and len(said) < 2:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kept = [line for line in lines if not line.startswith(NOT_FOR_USERS)]
        said.append(" ".join(kept))
        if error.__cause__ is None:
            break
        error = error.__cause__
    return ": ".join(dict.fromkeys(said)) + " (megaqad <command> --help lists the settings)"
