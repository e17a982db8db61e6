"""The CPU kernel in C++ (native.cpp): compiled once per machine with the compiler it has, or not at all
(megaqad/compiled.py).

PyTorch's elementwise operations go over memory about ten times for what one pass can do, and torch.compile needs the
same C++ compiler as this file. So the kernel is 300 lines of C++ without any header of PyTorch. Measured against
ModelOpt's loss it is 8 to 9 times faster, the PyTorch kernel 1 to 2. Where it cannot be compiled `unavailable()` says
why and `impl="auto"` takes the PyTorch kernel.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megaqad import compiled
from megaqad.compiled import address

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_SMALLEST_SHARE = 1 << 15
"""Logits below which another thread costs more than it saves."""


class _Shape(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    loaded = compiled.load(SOURCE, _FLAGS)
    if not isinstance(loaded, str):
        loaded.megaqad_kl_statistics.restype = loaded.megaqad_kl_gradient.restype = None
    return loaded


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine; None if it can. The first call may compile it."""
    return compiled.reason(_load())


def serves(device: torch.device, dtypes: set[torch.dtype]) -> bool:
    """Whether the kernel handles such logits: on the CPU, FP32 or BF16."""
    return device.type == "cpu" and dtypes <= {torch.float32, torch.bfloat16}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.numel() == 0 else logits.contiguous()


def _operands(student: Tensor, teacher: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p, int, int]:
    teacher_type = -1 if teacher is None else int(teacher.dtype == torch.bfloat16)
    return address(student), address(teacher), int(student.dtype == torch.bfloat16), teacher_type


def _shape(student: Tensor, teacher: Tensor | None, temperature: float, out: Tensor | None = None) -> _Shape:
    rows, columns = student.shape
    return _Shape(
        rows=rows,
        columns=columns,
        student_stride=student.stride(0),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        out_stride=0 if out is None else out.stride(0),
        inverse_temperature=1.0 / temperature,
        threads=max(1, min(torch.get_num_threads(), rows * columns // _SMALLEST_SHARE)),
    )


def statistics(student: Tensor, teacher: Tensor | None, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """See `blocks.statistics`."""
    student, teacher = _rows(student), None if teacher is None else _rows(teacher)
    out = torch.zeros(2 if teacher is None else 5, student.shape[0], dtype=torch.float64)
    mask = None if mask is None else mask.contiguous()
    shape = _shape(student, teacher, temperature)
    compiled.library(_load()).megaqad_kl_statistics(
        *_operands(student, teacher), address(mask), address(out), ctypes.byref(shape)
    )
    return out


def gradient(
    student: Tensor, teacher: Tensor | None, *, peaks: Tensor, factors: Tensor, temperature: float, out: Tensor
) -> Tensor:
    """See `blocks.gradient`."""
    student, teacher = _rows(student), None if teacher is None else _rows(teacher)
    peaks, factors = peaks.contiguous(), factors.contiguous()
    assert out.dtype in (student.dtype, torch.bfloat16)
    assert out.stride(-1) == 1 or out.numel() == 0
    shape = _shape(student, teacher, temperature, out)
    compiled.library(_load()).megaqad_kl_gradient(
        *_operands(student, teacher),
        *(address(peaks), address(factors), address(out), int(out.dtype == torch.bfloat16), ctypes.byref(shape)),
    )
    # a write through a pointer is unseen by autograd: without this, a producer that saved its output would use the
    # gradient in its place without a word
    torch.autograd.graph.increment_version(out)
    return out
