"""Pieces on disk: whatever was cut one way is read another way, number for number."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqad.errors import UserError
from megaqad.runtime.files import write_safetensors
from megaqad.training.pieces import Box, LocalPiece, Piece
from megaqad.training.store import PIECES_KEY, PieceReader, to_host, write_pieces


def cut(whole, key, grid, runs):
    """A tensor as pieces: ``grid`` boxes along each dim, each box in ``runs`` runs."""
    sizes = [size // parts for size, parts in zip(whole.shape, grid, strict=True)]
    pieces = []
    for cell in itertools.product(*map(range, grid)):
        offset = tuple(index * size for index, size in zip(cell, sizes, strict=True))
        part = whole[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))]
        flat = part.reshape(-1)
        bounds = [flat.numel() * run // runs for run in range(runs + 1)]
        for start, stop in itertools.pairwise(bounds):
            piece = Piece(key, tuple(whole.shape), Box(offset, tuple(sizes)), start, stop)
            pieces.append(LocalPiece(piece, flat[start:stop], owned=True))
    return pieces


def written(folder, pieces, ranks):
    """Divide pieces among files as ranks do."""
    files = []
    for rank in range(ranks):
        files.append(folder / f"rank_{rank}.safetensors")
        write_pieces(files[-1], to_host(pieces[rank::ranks]))
    return PieceReader(files)


@settings(max_examples=40, deadline=None)
@given(
    written_grid=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3])),
    read_grid=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2])),
    runs=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_cut_reads_any_other(tmp_path_factory, written_grid, read_grid, runs, dtype):
    whole = torch.arange(12 * 6, dtype=torch.float32).reshape(12, 6).to(dtype)
    reader = written(tmp_path_factory.mktemp("cut"), cut(whole, "w", written_grid, runs[0]), ranks=3)
    assert reader.names() == {"w"}
    assert reader.incomplete() == []
    for local in cut(whole, "w", read_grid, runs[1]):
        found = reader.read(local.piece)
        assert found.dtype == dtype
        assert torch.equal(found, local.data)


def test_scalars_and_leading_axes(tmp_path):
    scalar = LocalPiece(Piece("amax", (), Box((), ()), 0, 1), torch.tensor([3.5]), owned=True)
    layer = LocalPiece(Piece("layers", (4, 2, 3), Box((2, 0, 0), (1, 2, 3)), 0, 6), torch.arange(6.0), owned=True)
    reader = written(tmp_path, [scalar, layer], ranks=1)
    assert reader.read(scalar.piece).item() == 3.5
    assert torch.equal(reader.read(layer.piece), layer.data)
    assert reader.incomplete() == ["layers"]  # three of the four layers are nowhere


def test_only_owners_write(tmp_path):
    whole = torch.arange(8.0)
    replica = [LocalPiece(local.piece, local.data, owned=False) for local in cut(whole, "w", (1,), 1)]
    reader = written(tmp_path, replica, ranks=1)
    assert reader.names() == set()


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    reader = written(tmp_path, cut(torch.randn(258, 4), "head", (1, 1), 2), ranks=2)
    with pytest.raises(UserError, match=r"head has shape \[258, 4\] in the checkpoint and \[260, 4\] here"):
        reader.read(Piece("head", (260, 4), Box((130, 0), (130, 4)), 0, 520))


def test_what_is_not_there(tmp_path):
    reader = written(tmp_path, cut(torch.ones(4), "w", (1,), 1), ranks=1)
    with pytest.raises(UserError, match="no tensor v: it belongs to another model or recipe"):
        reader.read(Piece("v", (4,), Box((0,), (4,)), 0, 4))


@pytest.mark.parametrize(
    "entry",
    [
        ["w", [4], [0], [4], 0, 5],  # past the box
        ["w", [4], [2], [4], 0, 4],  # past the tensor
        ["w", [4], [-1], [4], 0, 4],
        ["w", [4, 1], [0], [4], 0, 4],  # another number of dims
        ["w", [4], [0], [4], 0],  # incomplete
        "w",
    ],
)
def test_impossible_descriptions_are_refused(tmp_path, entry):
    path = tmp_path / "rank.safetensors"
    write_safetensors(path, {"w": torch.ones(4)}, {PIECES_KEY: json.dumps({"w": entry})})
    with pytest.raises(UserError, match="is no part of a checkpoint"):
        PieceReader([path])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    write_safetensors(tmp_path / "plain", {"w": torch.ones(4)}, {})
    for name in ("text", "plain", "missing"):
        with pytest.raises(UserError, match=f"{name} is no part of a checkpoint"):
            PieceReader([tmp_path / name])
