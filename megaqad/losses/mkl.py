"""BF16 x BF16 -> FP32 on the CPU: MKL's `cblas_gemm_bf16bf16f32`, called inside PyTorch's own library.

PyTorch links MKL into its x86 builds and exports MKL's C interface, but no operator of it returns FP32 from BF16
operands on the CPU. Measured on a processor with AMX, 512 tokens, vocabulary 32,000, hidden size 1024, the call takes
1.0 to 1.9 times PyTorch's BF16 product, and widening the operands to FP32 five times. On processors without BF16
instructions MKL widens by itself, at the speed of an FP32 product. All functions are local; no collectives.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # CBLAS_LAYOUT, CBLAS_TRANSPOSE


@functools.cache
def _gemm() -> Callable[..., None] | None:
    """The function, or None where PyTorch was built without MKL (ARM, macOS) or keeps it to itself (Windows)."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    integer, real, matrix = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    found.argtypes = (
        *(integer, integer, integer),  # layout, transposition of a and b
        *(integer, integer, integer),  # m, n, k
        *(real, matrix, integer, matrix, integer),  # alpha, a and its stride, b and its stride
        *(real, matrix, integer),  # beta, c and its stride
    )
    found.restype = None
    return found


def available() -> bool:
    """Whether `mm_` can run on this machine."""
    return _gemm() is not None


def _has_dense_rows(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return matrix.stride(1) == 1 and (rows == 1 or matrix.stride(0) >= columns)


def _stored(matrix: Tensor) -> tuple[int, Tensor]:
    """Whether it lies transposed in memory, and the memory: a matrix with dense rows."""
    assert matrix.dtype == torch.bfloat16
    assert matrix.device.type == "cpu"
    if _has_dense_rows(matrix):
        return _PLAIN, matrix
    return (_TRANSPOSED, matrix.t()) if _has_dense_rows(matrix.t()) else (_PLAIN, matrix.contiguous())


def _leading(matrix: Tensor) -> int:
    """Elements from one row to the next; PyTorch gives a single row any stride, MKL wants at least its length."""
    return max(matrix.stride(0), matrix.shape[1])


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out [m, n] FP32 = a [m, k] @ b [k, n], both BF16 on the CPU; `accumulate`: += instead. Sums are FP32."""
    gemm = _gemm()
    assert gemm is not None
    (rows, inner), columns = a.shape, b.shape[1]
    assert out.shape == (rows, columns)
    assert b.shape[0] == inner
    assert out.dtype == torch.float32
    assert out.numel() == 0 or _has_dense_rows(out)
    if 0 in (rows, columns, inner):  # MKL refuses leading dimensions of 0
        return out if accumulate else out.zero_()
    (layout_a, a), (layout_b, b) = _stored(a), _stored(b)
    gemm(
        *(_ROW_MAJOR, layout_a, layout_b, rows, columns, inner),
        *(1.0, ctypes.c_void_p(a.data_ptr()), _leading(a), ctypes.c_void_p(b.data_ptr()), _leading(b)),
        *(float(accumulate), ctypes.c_void_p(out.data_ptr()), _leading(out)),
    )
    torch.autograd.graph.increment_version(out)  # autograd does not see a write through a pointer
    return out
