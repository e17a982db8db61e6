"""Install into NVIDIA's image without replacing what NVIDIA built: its torch, Transformer Engine, Apex and their like.

    python image.py constraints constraints.txt > image-constraints.txt    before pip: what pip must leave alone
    python image.py check image-constraints.txt                            after pip: whether it did

What NVIDIA builds itself stands nowhere on PyPI and is compiled against one another, so replacing one of them (pip
does, as soon as a version in constraints.txt differs) breaks the rest. They are known by their local version
(``2.12.0a0+5aff3928d8.nv26.05``), and a few of them, whose versions look like PyPI's, by their names.
"""

import importlib.metadata
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

BUILT_BY_NVIDIA = {
    *("apex", "flash-attn", "torch", "torchvision", "triton"),
    *("transformer-engine", "transformer-engine-torch"),
}
DIVIDER = "# from constraints.txt"
NEEDED = ("torch", "transformer-engine", "apex")
"""What the image is taken for. Which versions will do is said once, by megaqad's own requirements, extras included."""


def normalized(name: str) -> str:
    """A distribution's name as the index writes it: ``transformer_engine`` is ``transformer-engine``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name -> version of everything in this Python."""
    return {normalized(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}


def kept(versions: Mapping[str, str]) -> dict[str, str]:
    """Those of the installed distributions that are NVIDIA's own builds."""
    return {name: version for name, version in versions.items() if name in BUILT_BY_NVIDIA or "+" in version}


def merged(constraints: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    """The project's constraints, but the image's version of whatever the image built."""
    own = kept(versions)
    ours = [line for line in constraints if line and not line.startswith("#")]
    theirs = sorted(f"{name}=={version}" for name, version in own.items())
    return [*theirs, DIVIDER, *(line for line in ours if normalized(line.partition("==")[0]) not in own)]


def problems(before: Sequence[str], versions: Mapping[str, str], requirements: Sequence[str]) -> list[str]:
    """What is wrong with the image after the installation; empty when nothing is.

    Args:
        before: the constraints that pip was given.
        versions: of what is installed.
        requirements: megaqad's, as in its metadata.
    """
    found = []
    for line in itertools.takewhile(lambda line: line != DIVIDER, before):
        name, _, version = line.partition("==")
        if versions.get(name) != version:
            found.append(f"{name} {version} was replaced by {versions.get(name, 'nothing')}")
    wanted = {normalized(one.name): one.specifier for one in map(Requirement, requirements)}
    for name in NEEDED:
        if name not in versions:
            found.append(f"{name} is missing")
        elif name in wanted and not wanted[name].contains(versions[name], prereleases=True):
            found.append(f"{name} {versions[name]} is not {wanted[name]}: build on another BASE")
    return found


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    action, path = arguments
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if action == "constraints":
        print("\n".join(merged(lines, installed())))
        return 0
    assert action == "check", action
    requirements = importlib.metadata.requires("megaqad")
    assert requirements is not None, "megaqad was installed without its metadata"
    found = problems(lines, installed(), requirements)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
