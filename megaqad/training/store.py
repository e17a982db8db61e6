"""Pieces on disk: each rank writes one safetensors file, any layout reads what it needs from all of them.

A file holds its pieces as flat tensors; which piece each is stands as JSON in the file's header, so a file explains
itself and nothing is ever unpickled (Megatron-Core's own format keeps its index and its common state as pickles).

Reading a piece takes the cheapest way that is right. Where the checkpoint was cut into the same boxes (same tensor and
pipeline layout, any number of data-parallel ranks), only the bytes asked for are read. Otherwise the boxes that overlap
are put together one at a time and the common part is copied.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megaqad.errors import UserError
from megaqad.runtime.files import FileDigest, write_safetensors
from megaqad.runtime.mapped import MappedFiles
from megaqad.training.pieces import Box, LocalPiece, Piece

PIECES_KEY = "pieces"


@dataclass(frozen=True)
class HostPiece:
    """A piece in host memory, on its way to the disk."""

    piece: Piece
    data: Tensor
    """On the CPU, piece.numel elements, a copy: the live tensor trains on."""


@dataclass(frozen=True)
class StoredPiece:
    """A piece in a file."""

    piece: Piece
    file: Path
    name: str
    """Of the tensor in the file."""


def to_host(pieces: Iterable[LocalPiece]) -> list[HostPiece]:
    """Copy what this rank writes into host memory; all copies are complete when this returns."""
    return [
        HostPiece(local.piece, torch.empty(local.data.shape, dtype=local.data.dtype, device="cpu").copy_(local.data))
        for local in pieces
        if local.owned
    ]


def write_pieces(path: Path, pieces: Sequence[HostPiece]) -> FileDigest:
    """Write one rank's pieces to a new file.

    Raises:
        OSError: as from ``write_safetensors``.
    """
    tensors: dict[str, Tensor] = {}
    described = {}
    for held in pieces:
        piece = held.piece
        name = f"{piece.key}@{','.join(map(str, piece.box.offset))}:{piece.start}"
        assert name not in tensors, f"{name} is held twice on one rank"
        tensors[name] = held.data
        described[name] = [piece.key, piece.global_shape, piece.box.offset, piece.box.shape, piece.start, piece.stop]
    return write_safetensors(path, tensors, {PIECES_KEY: json.dumps(described)})


class PieceReader:
    """All pieces of one or more files."""

    def __init__(self, files: Iterable[Path]) -> None:
        """
        Raises:
            UserError: a file is missing, is no safetensors file, or describes pieces that it cannot hold.
        """
        self._stored: dict[str, list[StoredPiece]] = defaultdict(list)
        self._files = MappedFiles()
        for file in files:
            for stored in self._describe(file):
                self._stored[stored.piece.key].append(stored)

    def _describe(self, file: Path) -> list[StoredPiece]:
        try:
            described = json.loads(self._files.file(file, 0).metadata()[PIECES_KEY])
            return [StoredPiece(_parse(entry), file, name) for name, entry in described.items()]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no part of a checkpoint ({error}): use another checkpoint") from error

    def names(self) -> set[str]:
        """Keys of the tensors in the checkpoint."""
        return set(self._stored)

    def incomplete(self) -> list[str]:
        """Names of the tensors that the pieces do not cover exactly once."""
        return [
            key
            for key, stored in self._stored.items()
            if sum(one.piece.numel for one in stored) != Box((), stored[0].piece.global_shape).numel
        ]

    def read(self, piece: Piece) -> Tensor:
        """The numbers of a piece, from however the checkpoint was cut: flat, piece.numel elements, on the CPU.

        Raises:
            UserError: the checkpoint has no such tensor, or one of another shape.
        """
        stored = self._stored.get(piece.key)
        if not stored:
            raise UserError(f"the checkpoint has no tensor {piece.key}: it belongs to another model or recipe")
        found = stored[0].piece.global_shape
        if found != piece.global_shape:
            raise UserError(
                f"{piece.key} has shape {list(found)} in the checkpoint and {list(piece.global_shape)} here: it "
                "belongs to another model or recipe"
            )
        same_box = [one for one in stored if one.piece.box == piece.box]
        if sum(one.piece.numel for one in same_box) == piece.box.numel:
            return self._run_of_box(same_box, piece.start, piece.stop)
        whole = torch.zeros(piece.box.shape, dtype=self._dtype(stored[0]))
        for box, parts in _by_box(stored).items():
            overlap = _overlap(piece.box, box)
            if overlap is not None:
                here, there = overlap
                whole[here] = self._run_of_box(parts, 0, box.numel).reshape(box.shape)[there]
        return whole.reshape(-1)[piece.start : piece.stop].clone()

    def read_whole(self, key: str) -> Tensor:
        """A tensor in its global shape. Its key is one of ``names()``."""
        shape = self._stored[key][0].piece.global_shape
        box = Box((0,) * len(shape), shape)
        return self.read(Piece(key, shape, box, 0, box.numel)).reshape(shape)

    def _run_of_box(self, parts: Sequence[StoredPiece], start: int, stop: int) -> Tensor:
        """[stop - start]: elements [start, stop) of a flattened box, which ``parts`` cover together."""
        values = torch.empty(stop - start, dtype=self._dtype(parts[0]))
        for one in parts:
            low, high = max(start, one.piece.start), min(stop, one.piece.stop)
            if low < high:
                size = (high - low) * values.itemsize
                flat = self._files.file(one.file, size).get_slice(one.name)
                values[low - start : high - start] = flat[low - one.piece.start : high - one.piece.start]
        return values

    def _dtype(self, stored: StoredPiece) -> torch.dtype:
        return self._files.file(stored.file, 0).get_slice(stored.name)[:0].dtype

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()


def _parse(entry: Any) -> Piece:
    """A piece from its description; ValueError when it describes nothing that can be."""
    key, global_shape, offset, shape, start, stop = entry
    piece = Piece(str(key), tuple(global_shape), Box(tuple(offset), tuple(shape)), int(start), int(stop))
    inside = len(piece.global_shape) == len(piece.box.offset) == len(piece.box.shape) and all(
        first >= 0 and first + size <= whole
        for first, size, whole in zip(piece.box.offset, piece.box.shape, piece.global_shape, strict=True)
    )
    if not inside or not 0 <= piece.start <= piece.stop <= piece.box.numel:
        raise ValueError(f"{key} describes a part outside of its tensor")
    return piece


def _by_box(stored: Iterable[StoredPiece]) -> Mapping[Box, list[StoredPiece]]:
    boxes: dict[Box, list[StoredPiece]] = defaultdict(list)
    for one in stored:
        boxes[one.piece.box].append(one)
    return boxes


def _overlap(target: Box, source: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What two boxes have in common, as slices of the first and of the second; None when nothing."""
    here, there = [], []
    for first, size, other, other_size in zip(target.offset, target.shape, source.offset, source.shape, strict=True):
        low, high = max(first, other), min(first + size, other + other_size)
        if low >= high:
            return None
        here.append(slice(low - first, high - first))
        there.append(slice(low - other, high - other))
    return tuple(here), tuple(there)
