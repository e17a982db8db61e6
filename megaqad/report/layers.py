"""Per-layer errors arranged for the eye: one row per kind of weight, one column per layer of the model.

Rows and columns come from the Hugging Face names: "model.layers.3.mlp.up_proj" is kind "mlp.up", layer 3. Weights that
share a GEMM are one row ("self_attn.q, k, v"); the experts of a layer are averaged into one cell.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaqad.report.results import LayerError

_IN_LAYER = re.compile(r"^.*?\.(?P<layer>\d+)\.(?P<kind>.+)$")
_EXPERT = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class LayerGrid:
    """errors: float64 [kinds, layers], NaN where a layer has no such quantized weight. averaged: a cell is a mean."""

    kinds: list[str]
    layers: list[int]
    errors: npt.NDArray[np.float64]
    averaged: bool


def layer_grid(rows: Sequence[LayerError]) -> LayerGrid | None:
    """Arrange the quantized weights that belong to a layer; None when there are none."""
    return grid_of([(row.module, row.relative_error) for row in rows if row.bits < 16])


def grid_of(values: Sequence[tuple[str, float]]) -> LayerGrid | None:
    """Arrange numbers by the module that each belongs to; those outside the layers have no cell."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for module, value in values:
        place = _place(module)
        if place is not None:
            cells[place].append(value)
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    errors = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), held in cells.items():
        errors[kinds.index(kind), layers.index(layer)] = sum(held) / len(held)
    return LayerGrid(kinds, layers, errors, averaged=any(len(held) > 1 for held in cells.values()))


def _place(module: str) -> tuple[str, int] | None:
    matches = [_IN_LAYER.match(name.strip()) for name in module.split(",")]
    first = matches[0]
    if first is None:
        return None
    kinds = [_EXPERT.sub(".*.", match["kind"]).removesuffix("_proj") for match in matches if match is not None]
    return ", ".join([kinds[0], *(kind.rpartition(".")[2] for kind in kinds[1:])]), int(first["layer"])
