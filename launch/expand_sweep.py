"""Write the list of a sweep: one line of settings per combination of the values given.

Values follow Hydra's grammar (``a,b``, ``range(1,4)``, ``choice(a,b)``), read by Hydra's own parser, so what works in a
multirun works here. Each run gets a folder of its own, numbered as its line, below the sweep's ``output_dir``; the list
is written there as ``sweep.txt`` and its path printed. A list that exists and differs is an error: its runs may be half
done, and array task N must stay the run it was.
"""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the overrides' values, the last one varying fastest.

    Raises:
        ValueError: an override that Hydra cannot read.
    """
    parser = OverridesParser.create()
    choices = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(f"{text!r} is no setting Hydra can read: {str(error).splitlines()[0]}") from error
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(combination) for combination in itertools.product(*choices)]


def lines_of(overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The sweep's folder, and its lines quoted for a shell.

    Raises:
        ValueError: no ``output_dir``, or nothing to sweep over.
    """
    folders = [text.partition("=")[2] for text in overrides if text.startswith("output_dir=")]
    if not folders:
        raise ValueError("output_dir is not set: give output_dir=<directory of the sweep>")
    folder = Path(folders[-1]).absolute()
    runs = combinations([text for text in overrides if not text.startswith("output_dir=")])
    if len(runs) == 1:
        raise ValueError("no setting has several values: give e.g. train.lr=1e-5,1e-6, or submit one run instead")
    return folder, [shlex.join([*run, f"output_dir={folder / str(number)}"]) for number, run in enumerate(runs, 1)]


def main(overrides: Sequence[str]) -> int:
    """Write the list and print its path; 2 with one line on a mistake."""
    try:
        folder, lines = lines_of(overrides)
        path = folder / "sweep.txt"
        text = "".join(f"{line}\n" for line in lines)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} lists another sweep: give another output_dir, or remove it")
    except ValueError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
