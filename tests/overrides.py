"""Settings for commands, where tests put theirs behind common ones."""

from collections.abc import Iterable


def merged(arguments: Iterable[str]) -> list[str]:
    """Without settings that a later one replaces: the command line refuses a setting that is given twice."""
    return list({argument.partition("=")[0]: argument for argument in map(str, arguments)}.values())
