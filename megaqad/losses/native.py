"""The CPU kernel in C++ (native.cpp): compiled once per machine with the compiler it has, or not at all.

PyTorch's elementwise operations go over memory about ten times for what one pass can do, and torch.compile needs the
same C++ compiler as this file. So the kernel is 200 lines of C++ without any header of PyTorch, compiled in about two
seconds into `$XDG_CACHE_HOME/megaqad` (default `~/.cache/megaqad`) under a name made of its source and the processor's
features, and called through ctypes. Measured against ModelOpt's loss it is 5-10 times faster, the PyTorch kernel 1-2.
Without a compiler, or where the cache cannot be written, `unavailable()` says so and `impl="auto"` takes the PyTorch
kernel. OpenMP comes from the runtime that PyTorch has already loaded, so both share one set of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_COMPILE_SECONDS = 120
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


def _processor() -> str:
    """What -march=native depends on: a cache shared by different machines must not mix their code."""
    features = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for name in (named, "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


def _compile(compiler: str, library: Path) -> None:
    """Compile beside the target and rename: many ranks may do this at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        command = [compiler, *_FLAGS, str(SOURCE), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        fresh.replace(library)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    key = hashlib.sha256(f"{SOURCE.read_text()}{_FLAGS}{_processor()}".encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaqad"
        library = cache / f"losses-{key}.so"
        if not library.exists():
            compiler = _compiler()
            if compiler is None:
                return "no C++ compiler (set CXX, or install g++)"
            _compile(compiler, library)
        loaded = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} cannot compile {SOURCE.name}: {str(error.stderr).strip().splitlines()[-1:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    loaded.megaqad_kl_statistics.restype = loaded.megaqad_kl_gradient.restype = None
    return loaded


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine; None if it can. The first call may compile it."""
    library = _load()
    return library if isinstance(library, str) else None


def serves(device: torch.device, dtypes: set[torch.dtype]) -> bool:
    """Whether the kernel handles such logits: on the CPU, FP32 or BF16."""
    return device.type == "cpu" and dtypes <= {torch.float32, torch.bfloat16}


def _library() -> ctypes.CDLL:
    library = _load()
    assert not isinstance(library, str), library
    return library


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.numel() == 0 else logits.contiguous()


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _operands(student: Tensor, teacher: Tensor | None) -> tuple[ctypes.c_void_p, ctypes.c_void_p, int, int]:
    teacher_type = -1 if teacher is None else int(teacher.dtype == torch.bfloat16)
    return _address(student), _address(teacher), int(student.dtype == torch.bfloat16), teacher_type


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
    _library().megaqad_kl_statistics(*_operands(student, teacher), _address(mask), _address(out), ctypes.byref(shape))
    return out


def gradient(
    student: Tensor, teacher: Tensor | None, *, peaks: Tensor, factors: Tensor, temperature: float, out: Tensor
) -> Tensor:
    """See `blocks.gradient`."""
    student, teacher = _rows(student), None if teacher is None else _rows(teacher)
    peaks, factors = peaks.contiguous(), factors.contiguous()
    assert out.dtype == student.dtype
    assert out.stride(-1) == 1 or out.numel() == 0
    shape = _shape(student, teacher, temperature, out)
    _library().megaqad_kl_gradient(
        *_operands(student, teacher), _address(peaks), _address(factors), _address(out), ctypes.byref(shape)
    )
    # a write through a pointer is unseen by autograd: without this, a producer that saved its output would use the
    # gradient in its place without a word
    torch.autograd.graph.increment_version(out)
    return out
