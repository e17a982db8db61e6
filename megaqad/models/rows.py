"""The rows of one model: its family's table (``families.py``) with the numbers of its description put in.

Which tensors its checkpoint has, in which order, and which linear layers it is made of. No torch.
"""

from dataclasses import dataclass, replace

from megaqad.models.description import ModelDescription
from megaqad.models.families import EMBEDDING_ROW, HEAD_ROW, HfTensor, Row, Shard


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of the model, as the quantization recipe sees it."""

    layer: int
    """Global layer index; the number of layers for the head."""
    role: str
    """``qkv``, ``proj``, ``fc1``, ``fc2`` or ``head``."""
    parallel: str
    """``column`` or ``row``."""
    hf_modules: tuple[str, ...]
    """Names of the Hugging Face linear modules whose weights it holds, in the order they are joined."""


@dataclass(frozen=True)
class PlacedRow:
    """A row at its place in the model."""

    row: Row
    layer: int | None
    """Global layer index, None before and after the layers."""
    after_layers: bool = False

    @property
    def parts(self) -> tuple[HfTensor, ...]:
        """The Hugging Face tensors with their full names."""
        return self.row.parts if self.layer is None else self.row.at_layer(self.layer)


def placed_rows(description: ModelDescription) -> list[PlacedRow]:
    """Every row of the model in checkpoint order; with a tied head its row becomes an alias of the embedding."""
    table = description.table
    rows = [PlacedRow(row, None) for row in table.first]
    rows += [PlacedRow(row, layer) for layer in range(description.num_layers) for row in table.layer]
    for row in table.last:
        tied = row is HEAD_ROW and description.tied_embeddings
        rows.append(PlacedRow(replace(row, parts=EMBEDDING_ROW.parts, alias=True) if tied else row, None, True))
    return rows


def hf_tensors(description: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint must have, in checkpoint order."""
    dims = description.dims
    return {
        part.name: part.sizes(dims)
        for placed in placed_rows(description)
        if not placed.row.alias
        for part in placed.parts
    }


def linear_modules(description: ModelDescription) -> list[str]:
    """Hugging Face names of the layers' linear modules, in model order; the head is not among them."""
    return [
        name
        for layer in range(description.num_layers)
        for site in linear_sites(description, layer).values()
        for name in site.hf_modules
    ]


def linear_sites(description: ModelDescription, layer: int) -> dict[str, LinearSite]:
    """The linear layers of one (global) layer, by role."""
    return {
        row.role: LinearSite(
            layer=layer,
            role=row.role,
            parallel="row" if row.shard is Shard.ROW else "column",
            hf_modules=tuple(part.module for part in row.at_layer(layer)),
        )
        for row in description.table.layer
        if row.role is not None
    }


def head_site(description: ModelDescription) -> LinearSite:
    """The output head as a linear layer."""
    return LinearSite(description.num_layers, "head", "column", (HEAD_ROW.parts[0].module,))


def contraction_sizes(description: ModelDescription, tensor: int) -> dict[str, int]:
    """By linear module, head included: how many inputs a rank of ``tensor`` multiplies, along which blocks lie."""
    dims = description.dims
    sizes = {
        part.module: dims[part.shape[1]] // (tensor if row.shard is Shard.ROW else 1)
        for layer in range(description.num_layers)
        for row in description.table.layer
        if row.role is not None
        for part in row.at_layer(layer)
    }
    return {**sizes, HEAD_ROW.parts[0].module: description.hidden_size}
