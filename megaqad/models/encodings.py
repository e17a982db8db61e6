"""Checkpoints whose weights are stored in a number format: read as the BF16 values that they stand for.

    FP8         weight float8_e4m3fn [N, K] with float scales: weight_scale_inv [N / 128, K / 128] (DeepSeek, Qwen) or
                weight_scale [N / 128, K / 128], [N, 1], [N], [1] or []
    MXFP8       weight float8_e4m3fn [N, K], weight_scale uint8 [N, K / 32], exponents of powers of two
    MXFP4       weight or weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32]
    NVFP4       weight uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_scale_2 [] (ModelOpt)
    NVFP4       weight_packed, weight_scale, weight_global_scale (compressed-tensors)

A rank reads just the rows and columns that it holds. Values are computed in FP32 and rounded once to BF16, as the
engines that multiply in BF16 do.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.models.checkpoint_files import TensorEntry, read_headers, weight_files
from megaqad.nvfp4 import NVFP4Tensor, dequantize
from megaqad.nvfp4.format import BLOCK_SIZE
from megaqad.nvfp4.reference import decode_e8m0, unpack_e2m1

Spans = tuple[tuple[int, int], ...]
"""Per dim (start, stop)."""
ReadSlice = Callable[[str, Spans], Tensor]
"""(name, spans) -> that part of a stored tensor."""
DEFAULT_FP8_BLOCK = (128, 128)
MX_BLOCK = 32
SCALES_OF_ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
"""Endings of what a quantized checkpoint holds for other numbers than weights."""


@dataclass(frozen=True)
class Encoding:
    """How the weight of one module is stored."""

    kind: str
    """For people."""
    codes: str
    """Name of the tensor that holds its elements."""
    scales: tuple[str, ...]
    """Names of what belongs to them."""
    shape: tuple[int, ...]
    """Of the values."""
    read: Callable[[ReadSlice, Spans], Tensor]
    """Values of a part, BF16."""


def encoding_of(
    name: str, entries: Mapping[str, TensorEntry], quantization: Mapping[str, Any] | None = None
) -> Encoding | None:
    """How the tensor ``name`` is stored, None when it is as it is called, or in no way known here, or not at all.

    Args:
        entries: all tensors of the checkpoint.
        quantization: config.json's ``quantization_config``.
    """
    codes = name if name in entries else f"{name}_packed"
    if codes not in entries or len(entries[codes].shape) != 2:
        return None
    dtype, (rows, columns) = entries[codes].dtype, entries[codes].shape
    scale = next((one for one in (f"{name}_scale_inv", f"{name}_scale") if one in entries), None)
    if scale is None or dtype not in ("F8_E4M3", "U8"):
        return None
    second = next((one for one in (f"{name}_scale_2", f"{name}_global_scale") if one in entries), None)
    shape = (rows, columns if dtype == "F8_E4M3" else 2 * columns)
    if dtype == "U8" and second is not None:
        read = _nvfp4(codes, scale, second, inverted=second.endswith("_global_scale"))
        return Encoding("NVFP4", codes, (scale, second), shape, read)
    is_exponent = entries[scale].dtype == "U8"
    block = (1, MX_BLOCK) if is_exponent else _fp8_block(entries[scale].shape, shape, quantization or {})
    if (dtype == "U8" and not is_exponent) or not _covers(block, shape, entries[scale].shape):
        return None
    bits = 4 if dtype == "U8" else 8
    kind = f"MXFP{bits}" if is_exponent else "FP8" if 1 in block or block == shape else "block FP8"
    return Encoding(kind, codes, (scale,), shape, _scaled(codes, scale, entries[scale].shape, block, bits=bits))


def _fp8_block(scales: tuple[int, ...], shape: tuple[int, int], quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns under one scale."""
    rows, columns = shape
    if math.prod(scales) == 1:
        return shape
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    groups = quantization.get("config_groups") or {}  # compressed-tensors
    named = (group["weights"].get("block_structure") for group in groups.values() if group.get("weights"))
    block = quantization.get("weight_block_size") or next(filter(None, named), None) or DEFAULT_FP8_BLOCK
    return int(block[0]), int(block[1])


def _covers(block: tuple[int, int], shape: tuple[int, int], scales: tuple[int, ...]) -> bool:
    """Whether there is one scale for each block of a tensor."""
    grid = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
    return math.prod(scales) == 1 if grid == (1, 1) else scales in (grid, grid[:1] if grid[1] == 1 else grid)


class Checkpoint:
    """The tensors of a checkpoint directory as values, whatever they are stored in; headers only."""

    def __init__(self, model_dir: Path) -> None:
        """
        Raises:
            UserError: as ``read_headers``.
        """
        files = weight_files(Path(model_dir))
        self.note = files.note
        """What is passed over in the directory, for people."""
        self.entries = read_headers(Path(model_dir), files)
        config = Path(model_dir) / "config.json"
        content = json.loads(config.read_text(encoding="utf-8-sig")) if config.is_file() else {}
        quantization = content.get("quantization_config")
        self._quantization = quantization if isinstance(quantization, dict) else None
        self._encodings: dict[str, Encoding | None] = {}

    def encoding(self, name: str) -> Encoding | None:
        """How the tensor ``name`` is stored; None: as it is called, or not at all."""
        if name not in self._encodings:
            self._encodings[name] = encoding_of(name, self.entries, self._quantization)
        return self._encodings[name]

    def file_of(self, name: str) -> Path:
        """Where the elements of the tensor ``name`` are."""
        encoding = self.encoding(name)
        return self.entries[name if encoding is None else encoding.codes].file

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the values; None when there is no such tensor."""
        encoding = self.encoding(name)
        if encoding is not None:
            return encoding.shape
        return self.entries[name].shape if name in self.entries else None

    def unused_by(self, names: Iterable[str]) -> list[str]:
        """What is stored besides the tensors ``names`` and the scales that belong to them."""
        used: set[str] = set()
        for name in names:
            encoding = self.encoding(name)
            used |= {name} if encoding is None else {encoding.codes, *encoding.scales}
        left = (name for name in self.entries if name not in used)
        return [name for name in left if self._quantization is None or not name.endswith(SCALES_OF_ACTIVATIONS)]

    def kinds(self, names: Iterable[str]) -> Counter[str]:
        """How many of the tensors ``names`` are stored in which number format."""
        return Counter(encoding.kind for name in names if (encoding := self.encoding(name)) is not None)


def _scaled(
    codes: str, scales: str, scale_shape: tuple[int, ...], block: tuple[int, int], *, bits: int
) -> Callable[[ReadSlice, Spans], Tensor]:
    """Elements of 8 or 4 bits, each block of which has a scale: a float, or the biased exponent of a power of two."""

    def read(slice_of: ReadSlice, spans: Spans) -> Tensor:
        covering = tuple((start // size, -(-stop // size)) for (start, stop), size in zip(spans, block, strict=True))
        stored = ((0, 1),) * len(scale_shape) if math.prod(scale_shape) == 1 else covering[: len(scale_shape)]
        scale = slice_of(scales, stored)
        scale = decode_e8m0(scale) if scale.dtype is torch.uint8 else scale.float()
        scale = scale.reshape([stop - start for start, stop in covering])
        for dim, ((start, stop), size) in enumerate(zip(spans, block, strict=True)):
            scale = scale.index_select(dim, torch.arange(start, stop) // size - start // size)
        if bits == 8:
            return (slice_of(codes, spans).float() * scale).bfloat16()
        rows, (start, stop) = spans
        packed = slice_of(codes, (rows, (start // 2, -(-stop // 2))))
        return (unpack_e2m1(packed)[:, start % 2 :][:, : stop - start] * scale).bfloat16()

    return read


def _nvfp4(codes: str, scales: str, second: str, *, inverted: bool) -> Callable[[ReadSlice, Spans], Tensor]:
    def read(slice_of: ReadSlice, spans: Spans) -> Tensor:
        rows, (start, stop) = spans
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        packed = slice_of(codes, (rows, (first * BLOCK_SIZE // 2, last * BLOCK_SIZE // 2)))
        scale = slice_of(second, ()).float().reshape(())
        scale = scale.reciprocal() if inverted else scale
        blocks = NVFP4Tensor(packed, slice_of(scales, (rows, (first, last))), scale)
        return dequantize(blocks, torch.bfloat16)[:, start - first * BLOCK_SIZE :][:, : stop - start]

    return read
