"""What ranks do in the tests of families."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from megaqad.models.families import families
from megaqad.runtime.ranks import ParallelSizes
from tests.models.megatron_runs import local_logits


def import_file(path: Path) -> None:
    """Run a Python file that no package holds; a family registers itself."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def logits_of_new_family(
    rank: int, world: int, family_file: Path, folder: Path, sizes: ParallelSizes, tokens: np.ndarray
) -> Any:
    """``local_logits`` of a family that is not shipped; the worker forgets it again."""
    before = dict(families())
    import_file(family_file)
    try:
        return local_logits(rank, world, folder, sizes, tokens)
    finally:
        for name in families().keys() - before.keys():
            del families()[name]
