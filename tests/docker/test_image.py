"""What NVIDIA built stays, everything else follows constraints.txt. No Docker is needed to know that."""

import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("image", REPOSITORY / "docker" / "image.py")
assert _spec is not None
assert _spec.loader is not None
image = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(image)

IMAGE = {
    "torch": "2.12.0a0+5aff3928d8.nv26.05",
    "transformer-engine": "2.14.0+abc1234",
    "apex": "0.1",
    "torchdata": "0.12.0+cpu",
    "transformers": "4.57.0",
}


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
    assert image.problems(before, IMAGE) == []
    versions = {name: version for name, version in (IMAGE | after).items() if version is not None}
    assert problem in image.problems(before, versions)


def test_image_that_lacks_what_it_is_for_is_refused() -> None:
    without_apex = {name: version for name, version in IMAGE.items() if name != "apex"}
    assert image.problems([], without_apex) == ["apex is missing"]
    old = IMAGE | {"transformer-engine": "2.9.0+abc"}
    assert image.problems([], old) == ["transformer-engine 2.9.0+abc is older than 2.12"]


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
