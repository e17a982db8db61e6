"""The C++ implementation for CPUs (native.cpp): the same bits as the reference from one pass over memory.

Compiled once per machine with the compiler it has, or not at all (megaqad/compiled.py). Where it cannot be compiled
``unavailable()`` says why, and ``impl="auto"`` takes ``vectorized``, which goes over the data a dozen times.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megaqad import compiled
from megaqad.compiled import address
from megaqad.nvfp4.format import BLOCK_SIZE, NVFP4Tensor, global_scale_from_amax, tensor_amax

SOURCE, FORMATS = (Path(__file__).with_name(name) for name in ("native.cpp", "formats.h"))
_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-trapping-math")
"""Nothing that changes a result: products and sums stay apart, and only floating-point exception flags are given up."""

_SMALLEST_SHARE = 1 << 14
"""Elements below which another thread costs more than it saves."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Shape(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("blocks_per_row", ctypes.c_int64),
        ("type", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    loaded = compiled.load(SOURCE, _FLAGS, (FORMATS, compiled.VECTORS))
    if not isinstance(loaded, str):
        loaded.megaqad_nvfp4_quantize.restype = loaded.megaqad_nvfp4_dequantize.restype = None
        loaded.megaqad_nvfp4_squared_errors.restype = loaded.megaqad_nvfp4_row_amax.restype = None
    return loaded


def unavailable() -> str | None:
    """Why this implementation cannot run on this machine; None if it can. The first call may compile it."""
    return compiled.reason(_load())


def run(
    x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None, *, want_values: bool, want_codes: bool
) -> tuple[Tensor | None, NVFP4Tensor | None]:
    """As ``reference.run``, bit for bit."""
    x = x.detach().contiguous()
    global_scale = global_scale_from_amax(_tensor_amax(x) if amax is None else amax).detach().contiguous()
    chosen = None if block_amax is None else block_amax.detach().contiguous()
    values = torch.empty(x.shape, dtype=x.dtype) if want_values else None  # dense whatever strides x has where it is 1
    codes = scales = None
    if want_codes:
        codes = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
        scales = torch.empty((*x.shape[:-1], x.shape[-1] // BLOCK_SIZE), dtype=torch.float8_e4m3fn)
    shape, addresses = _shape(x, global_scale), map(address, (x, global_scale, chosen, values, codes, scales))
    if x.numel():
        compiled.library(_load()).megaqad_nvfp4_quantize(*addresses, ctypes.byref(shape))
    if codes is None or scales is None:
        return values, None
    return values, NVFP4Tensor(codes, scales, global_scale)


def dequantize(q: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """As ``reference.dequantize``, bit for bit."""
    codes, scales, global_scale = (t.contiguous() for t in (q.codes, q.block_scales, q.global_scale))
    values = torch.empty(q.shape, dtype=dtype)
    shape, addresses = _shape(values, global_scale), map(address, (codes, scales, global_scale, values))
    if values.numel():
        compiled.library(_load()).megaqad_nvfp4_dequantize(*addresses, ctypes.byref(shape))
    return values


def squared_errors(blocks: Tensor, scales: Tensor) -> Tensor:
    """As ``reference.squared_errors``, bit for bit."""
    errors = torch.empty_like(scales)
    if len(blocks):
        addresses = map(address, (blocks, scales, errors))
        compiled.library(_load()).megaqad_nvfp4_squared_errors(*addresses, ctypes.byref(_shape(blocks, scales)))
    return errors


def row_amax(x: Tensor) -> Tensor:
    """As ``reference.row_amax``, bit for bit but for the payload of NaN."""
    x = x.detach().contiguous()
    out = x.new_empty((*x.shape[:-1], 1))
    sizes = ctypes.c_int64(out.numel()), ctypes.c_int64(x.shape[-1])
    compiled.library(_load()).megaqad_nvfp4_row_amax(address(x), address(out), _TYPES[x.dtype], *sizes, _threads(x))
    return out.float()


def _tensor_amax(x: Tensor) -> Tensor:
    """``format.tensor_amax``, five times as fast on large tensors."""
    return row_amax(x).amax() if x.numel() else tensor_amax(x)


def _shape(elements: Tensor, global_scale: Tensor) -> _Shape:
    rows = global_scale.numel()
    return _Shape(
        rows=rows,
        blocks_per_row=elements.numel() // BLOCK_SIZE // max(1, rows),
        type=_TYPES[elements.dtype],
        threads=_threads(elements),
    )


def _threads(elements: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), elements.numel() // _SMALLEST_SHARE))
