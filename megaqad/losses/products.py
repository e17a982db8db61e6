"""BF16 x BF16 -> FP32 products of an output head on the CPU (products.cpp), or in words why there are none.

Milliseconds on one thread for 512 tokens, a vocabulary of 32,000, hidden size 256 / 1024 / 2048:

| product | here | PyTorch's, BF16 result | widened to FP32 |
|---|---|---|---|
| logits | 12 / 35 / 71 | 14 / 36 / 74 | 54 / 180 / 358 |
| gradient of hidden states | 12 / 39 / 77 | 11 / 40 / 80 | |
| gradient of the head, added up | 17 / 49 / 93 | 15 / 47 / 114 | |

MKL's `cblas_gemm_bf16bf16f32` lies in PyTorch's x86 library too and needs no compiler; it was tried first and is
slower. All functions are local: `head` [V, H] is this rank's shard; no collectives.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from megaqad import compiled
from megaqad.compiled import address

SOURCE = Path(__file__).with_name("products.cpp")
_TORCH = Path(torch.__file__).parent
_FLAGS = (
    *("-std=c++20", f"-I{_TORCH / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
    *(f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-DMEGAQAD_TORCH={torch.__version__}"),
)
"""The version is there for the library's name in the cache: another PyTorch has another interface."""

NO_AMX = "the processor has no matrix instructions for BF16 (AMX)"


@functools.cache
def _load() -> ctypes.CDLL | str:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return NO_AMX
    library = compiled.load(SOURCE, _FLAGS, (compiled.VECTORS,))
    if not isinstance(library, str) and not library.megaqad_can_multiply():
        return NO_AMX
    return library


def unavailable() -> str | None:
    """Why these products cannot run on this machine; None if they can. The first call may compile them."""
    return compiled.reason(_load())


def serves(hidden_size: int) -> bool:
    """Whether heads of this width can be multiplied here: pairs of columns are loaded at once."""
    return hidden_size % 2 == 0 and unavailable() is None


def _call(name: str, matrices: tuple[Tensor, ...], sizes: tuple[int, int, int], *options: int) -> None:
    """Call with the address and the row stride of each matrix, none of them empty, and the sizes (n, V, H)."""
    assert 0 not in sizes
    places = [value for matrix in matrices for value in (address(matrix), ctypes.c_int64(matrix.stride(0)))]
    counts = [ctypes.c_int64(size) for size in sizes]
    compiled.library(_load())[name](
        *places, *counts, *(ctypes.c_int(option) for option in (torch.get_num_threads(), *options))
    )


def _rows(matrix: Tensor) -> Tensor:
    """The same with dense rows an even number of elements apart."""
    assert matrix.dtype == torch.bfloat16
    assert matrix.device.type == "cpu"
    dense = matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if dense and matrix.stride(0) % 2 == 0 else matrix.contiguous()


def logits_(out: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """out [n, V] FP32 = hidden [n, H] @ head^T; H is even."""
    sizes = (len(hidden), *head.shape)
    assert out.dtype == torch.float32
    assert out.stride(1) == 1 or out.shape[1] <= 1
    if out.numel():
        _call("megaqad_logits", (_rows(hidden), _rows(head), out), sizes)
        torch.autograd.graph.increment_version(out)  # autograd does not see a write through a pointer
    return out


def hidden_gradient(slope: Tensor, head: Tensor) -> Tensor:
    """FP32 [n, H] = slope [n, V] @ head."""
    sizes = (len(slope), *head.shape)
    if 0 in sizes:
        return torch.zeros(len(slope), head.shape[1], dtype=torch.float32)
    out = torch.empty(len(slope), head.shape[1], dtype=torch.float32)
    _call("megaqad_hidden_gradient", (_rows(slope), _rows(head), out), sizes)
    return out


def head_gradient(total: Tensor | None, slope: Tensor, hidden: Tensor) -> Tensor:
    """FP32 [V, H] = slope [n, V]^T @ hidden [n, H], or `total` [V, H] FP32 += that."""
    sizes = (*slope.shape, hidden.shape[1])
    if 0 in sizes:
        return torch.zeros(sizes[1:], dtype=torch.float32) if total is None else total
    out = torch.empty(sizes[1:], dtype=torch.float32) if total is None else total
    assert out.dtype == torch.float32
    assert out.stride(1) == 1 or out.shape[1] == 1
    _call("megaqad_head_gradient", (_rows(slope), _rows(hidden), out), sizes, int(total is not None))
    torch.autograd.graph.increment_version(out)
    return out
