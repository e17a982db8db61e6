"""Checkpoints whose weights are stored in a number format: read as the BF16 values that they stand for.

    block FP8          weight float8_e4m3fn [N, K], weight_scale_inv float32 [N / 128, K / 128] (DeepSeek, Qwen)
    FP8                weight float8_e4m3fn [N, K], weight_scale [], [1] or [N, 1]
    NVFP4              weight uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_scale_2 [] (ModelOpt)
    NVFP4              weight_packed, weight_scale, weight_global_scale (compressed-tensors)

A rank reads just the rows and columns that it holds. Values are computed in FP32 and rounded once to BF16, as the
engines that multiply in BF16 do.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaqad.models.checkpoint_files import TensorEntry, read_headers
from megaqad.nvfp4 import NVFP4Tensor, dequantize
from megaqad.nvfp4.format import BLOCK_SIZE

Spans = tuple[tuple[int, int], ...]
"""Per dim (start, stop)."""
ReadSlice = Callable[[str, Spans], Tensor]
"""(name, spans) -> that part of a stored tensor."""
DEFAULT_FP8_BLOCK = (128, 128)
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
    """How the tensor ``name`` is stored, None when it is as it is called (or not there at all).

    Args:
        entries: all tensors of the checkpoint.
        quantization: config.json's ``quantization_config``.
    """
    found = entries.get(name)
    if found is not None and found.dtype == "F8_E4M3":
        inverse, scale = f"{name}_scale_inv", f"{name}_scale"
        if inverse in entries:
            rows, columns = (quantization or {}).get("weight_block_size") or DEFAULT_FP8_BLOCK
            read = _block_fp8(name, inverse, (int(rows), int(columns)))
            return Encoding("block FP8", name, (inverse,), found.shape, read)
        if scale in entries:
            return Encoding("FP8", name, (scale,), found.shape, _fp8(name, scale, entries[scale].shape))
    codes = name if found is not None else f"{name}_packed"
    global_scale = f"{name}_scale_2" if found is not None else f"{name}_global_scale"
    if codes in entries and entries[codes].dtype == "U8" and global_scale in entries and f"{name}_scale" in entries:
        rows, packed = entries[codes].shape
        names = (f"{name}_scale", global_scale)
        return Encoding("NVFP4", codes, names, (rows, 2 * packed), _nvfp4(codes, *names, inverted=found is None))
    return None


class Checkpoint:
    """The tensors of a checkpoint directory as values, whatever they are stored in; headers only."""

    def __init__(self, model_dir: Path) -> None:
        """
        Raises:
            UserError: as ``read_headers``.
        """
        self.entries = read_headers(Path(model_dir))
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


def _whole(entries_shape: tuple[int, ...]) -> Spans:
    return tuple((0, size) for size in entries_shape)


def _block_fp8(codes: str, scales: str, block: tuple[int, int]) -> Callable[[ReadSlice, Spans], Tensor]:
    def read(slice_of: ReadSlice, spans: Spans) -> Tensor:
        covering = tuple((start // size, -(-stop // size)) for (start, stop), size in zip(spans, block, strict=True))
        scale = slice_of(scales, covering).float()
        for dim, ((start, stop), size) in enumerate(zip(spans, block, strict=True)):
            within = torch.arange(start, stop) // size - start // size
            scale = scale.index_select(dim, within)
        return (slice_of(codes, spans).float() * scale).bfloat16()

    return read


def _fp8(codes: str, scales: str, scale_shape: tuple[int, ...]) -> Callable[[ReadSlice, Spans], Tensor]:
    def read(slice_of: ReadSlice, spans: Spans) -> Tensor:
        of_rows = len(scale_shape) == len(spans) and scale_shape[0] > 1
        scale = slice_of(scales, (spans[0], (0, 1)) if of_rows else _whole(scale_shape)).float()
        scale = scale if of_rows else scale.reshape(())
        return (slice_of(codes, spans).float() * scale).bfloat16()

    return read


def _nvfp4(codes: str, scales: str, second: str, *, inverted: bool) -> Callable[[ReadSlice, Spans], Tensor]:
    def read(slice_of: ReadSlice, spans: Spans) -> Tensor:
        rows, (start, stop) = spans
        assert start % BLOCK_SIZE == stop % BLOCK_SIZE == 0, f"{codes} is cut within a block"
        packed = slice_of(codes, (rows, (start // 2, stop // 2)))
        blocks = slice_of(scales, (rows, (start // BLOCK_SIZE, stop // BLOCK_SIZE)))
        scale = slice_of(second, ()).float().reshape(())
        scale = scale.reciprocal() if inverted else scale
        return dequantize(NVFP4Tensor(packed, blocks, scale), torch.bfloat16)

    return read
