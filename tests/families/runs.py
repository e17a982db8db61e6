"""What ranks do in the tests of families."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaqad.models.families import families
from megaqad.runtime.ranks import ParallelSizes, parallel
from tests.models.megatron_runs import loaded_model, local_logits, run_hidden


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


def first_inputs(rank: int, world: int, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """[b, s, h]: what the first layer of a BF16 model sees."""
    seen: list[Tensor] = []
    with parallel(ParallelSizes()) as ranks, torch.no_grad():
        model = loaded_model(folder, ranks, torch.bfloat16)
        model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        run_hidden(model, tokens)
    return torch.cat(seen, 1).transpose(0, 1).float().numpy()
