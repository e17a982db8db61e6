"""What ``--help`` says of the settings, made from their definitions."""

import ast
import inspect
import textwrap
from dataclasses import MISSING as dataclass_missing
from dataclasses import fields, is_dataclass

from megaqad.config.settings import Settings


def settings_help() -> str:
    """Every setting with its default and its meaning, read from the sources of their classes."""
    return "\n".join(_describe_fields(Settings, ""))


def _describe_fields(kind: type, prefix: str) -> list[str]:
    """Lines for the fields of a settings class."""
    meanings: dict[str, str] = {}
    for part in kind.__mro__:
        meanings |= _meanings(part) if is_dataclass(part) else {}
    lines = []
    for setting in fields(kind):
        default = setting.default if setting.default_factory is dataclass_missing else setting.default_factory()
        if is_dataclass(default):
            lines += _describe_fields(type(default), f"{prefix}{setting.name}.")
        else:
            shown = "required" if default == "" else f"default {default}"
            meaning = textwrap.wrap(meanings[setting.name], 100, initial_indent="    ", subsequent_indent="    ")
            lines += [f"{prefix}{setting.name}  ({shown})", *meaning]
    return lines


def _meanings(kind: type) -> dict[str, str]:
    """The docstring below each field that the class itself declares, by the field's name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        field_node.target.id: " ".join(str(text.value.value).split())
        for field_node, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field_node, ast.AnnAssign)
        and isinstance(field_node.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
