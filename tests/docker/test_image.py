"""What NVIDIA built stays, everything else follows constraints.txt. No Docker is needed to know that."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

from megaqad.quantization.backend import LEAST_VERSION

REPOSITORY = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("image", REPOSITORY / "docker" / "image.py")
assert _spec is not None
assert _spec.loader is not None
image = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(image)

IMAGE = {
    "torch": "2.12.0a0+5aff3928d8.nv26.05",
    "transformer-engine": "2.15.0+abc1234",
    "apex": "0.1",
    "torchdata": "0.12.0+cpu",
    "transformers": "4.57.0",
}


REQUIREMENTS = ["torch>=2.9", "numpy>=2", 'transformer-engine[pytorch]>=2.15; extra == "cuda"']


def constraints() -> list[str]:
    return (REPOSITORY / "constraints.txt").read_text().splitlines()


def test_image_keeps_its_builds_and_takes_our_versions() -> None:
    lines = image.merged(constraints(), IMAGE)
    for name in ("torch", "transformer-engine", "apex", "torchdata"):
        assert [line for line in lines if line.startswith(f"{name}==")] == [f"{name}=={IMAGE[name]}"]
    ours = [line for line in constraints() if line and not line.startswith(("#", "torch=="))]
    assert set(ours) <= set(lines)


def test_names_are_compared_as_the_index_does() -> None:
    lines = image.merged(["Transformer_Engine==2.13.0", "numpy==2.4.6"], {"transformer-engine": "2.14.0+abc1234"})
    assert lines == ["transformer-engine==2.14.0+abc1234", image.DIVIDER, "numpy==2.4.6"]


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        ({"torch": "2.13.0"}, "torch 2.12.0a0+5aff3928d8.nv26.05 was replaced by 2.13.0"),
        ({"apex": "0.9.10.dev0"}, "apex 0.1 was replaced by 0.9.10.dev0"),
        ({"torchdata": None}, "torchdata 0.12.0+cpu was replaced by nothing"),
    ],
)
def test_replaced_build_is_named(after: dict[str, str | None], problem: str) -> None:
    before = image.merged(constraints(), IMAGE)
    assert image.problems(before, IMAGE, REQUIREMENTS) == []
    versions = {name: version for name, version in (IMAGE | after).items() if version is not None}
    assert problem in image.problems(before, versions, REQUIREMENTS)


def test_image_that_lacks_what_it_is_for_is_refused() -> None:
    without_apex = {name: version for name, version in IMAGE.items() if name != "apex"}
    assert image.problems([], without_apex, REQUIREMENTS) == ["apex is missing"]
    old = IMAGE | {"transformer-engine": "2.14.1+abc"}
    said = "transformer-engine 2.14.1+abc is not >=2.15: build on another BASE"
    assert image.problems([], old, REQUIREMENTS) == [said]


def test_transformer_engine_is_asked_for_as_its_backend_needs_it() -> None:
    """The image's check reads megaqad's metadata, which the build makes of pyproject.toml."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [extra] = project["optional-dependencies"]["cuda"]
    assert extra == f"transformer-engine[pytorch]>={'.'.join(map(str, LEAST_VERSION))}"


def test_images_are_given_what_they_copy() -> None:
    """Both builds send only a list of paths to Docker: what a Dockerfile copies must be in it, and exist."""
    for name in ("nvidia", "cpu"):
        dockerfile = (REPOSITORY / "docker" / f"{name}.Dockerfile").read_text()
        sent = (REPOSITORY / "docker" / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
        copied = [word for line in dockerfile.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
        assert copied
        for path in copied:
            assert f"!{path}" in sent
            assert (REPOSITORY / path).exists()
