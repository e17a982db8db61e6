"""The functions callers use, and the choice between implementations behind them.

Every implementation gives the same bits; they differ in speed and in where they run:

    reference   plain PyTorch, any device, the definition
    torch       vectorised PyTorch in cache-sized pieces, any device
    native      C++ compiled on first use, the default on the CPU where there is a compiler
    triton      one kernel, CUDA, the default there when Triton is installed

``impl="auto"`` picks by the tensor's device, and takes ``torch`` where the default is not to be had. Nothing here waits
for a device.
"""

import functools
import importlib
import importlib.util
import logging
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from megaqad.nvfp4 import native, reference, vectorized
from megaqad.nvfp4.format import BLOCK_SIZE, NVFP4Tensor, check_quantizable
from megaqad.nvfp4.straight_through import straight_through

_log = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "torch", "native", "triton"]


class Implementation(Protocol):
    """What a module must define to serve as an implementation: ``reference.py`` says what each function gives.

    Inputs are already checked; no gradients flow.
    """

    def run(
        self, x: Tensor, amax: Tensor | None, block_amax: Tensor | None = None, *, want_values: bool, want_codes: bool
    ) -> tuple[Tensor | None, NVFP4Tensor | None]: ...
    def dequantize(self, q: NVFP4Tensor, dtype: torch.dtype) -> Tensor: ...
    def squared_errors(self, blocks: Tensor, scales: Tensor) -> Tensor: ...
    def row_amax(self, x: Tensor) -> Tensor: ...


def implementation(impl: Impl, device: torch.device) -> Implementation:
    """The module that ``impl`` names, for a tensor on ``device``.

    Raises:
        ValueError: there is no such implementation, or what it needs is missing: a CPU and a compiler, or Triton.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, not {impl!r}")
    if impl == "auto":
        return _default(device.type)
    if impl == "reference":
        return reference
    if impl == "torch":
        return vectorized
    if impl == "native":
        reason = native.unavailable() if device.type == "cpu" else f"it runs on the CPU, not on {device}"
        if reason is not None:
            raise ValueError(f"impl='native' cannot run: {reason}; use impl='auto'")
        return native
    if not _triton_is_installed():
        raise ValueError("impl='triton' needs Triton: pip install triton, or use impl='auto'")
    return _triton_kernels()


@functools.cache
def _default(device_type: str) -> Implementation:
    """The fastest that can run there; said once where it is not the one that was meant to."""
    if device_type == "cuda" and _triton_is_installed():
        return _triton_kernels()
    if device_type == "cpu":
        reason = native.unavailable()
        if reason is None:
            return native
        _log.info("NVFP4 on the CPU uses the slower PyTorch implementation: %s", reason)
    return vectorized


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_kernels() -> Implementation:
    return cast(Implementation, importlib.import_module("megaqad.nvfp4.triton_kernels"))


@torch.no_grad()
def quantize(
    x: Tensor, amax: Tensor | None = None, *, block_amax: Tensor | None = None, impl: Impl = "auto"
) -> NVFP4Tensor:
    """Quantize ``x`` to NVFP4, byte for byte what ModelOpt 0.47 exports for the same tensor and amax.

    Args:
        x: [..., K] bfloat16, float16 or float32, K a multiple of 16; any strides, any leading shape, no rows allowed.
        amax: float32 [] that sets the global scale; None takes it from ``x``. Values beyond it saturate. For a tensor
            that is sharded, or that an engine fuses with others, pass the amax of the whole. float32 [..., 1], from
            ``row_amax``, sets a global scale for each row, as dynamic quantization of activations does per token.
        block_amax: float32 [..., K // 16] that sets the block scales, from ``choose_scales`` or learned, together with
            an ``amax``; None takes each block's own largest magnitude.

    Returns:
        codes uint8 [..., K // 2], block_scales float8_e4m3fn [..., K // 16], global_scale float32 in the shape of
        ``amax``.

    Sharding: local. Under a common ``amax`` the shards' bytes are the bytes of the whole, cut at multiples of 16.

    Raises:
        ValueError: unsupported dtype, K not a multiple of 16, malformed ``amax``, unknown ``impl``. NaN and Inf are not
            looked for here, since that would wait for the device: see ``check_finite``.
    """
    check_quantizable(x, amax)
    if block_amax is not None and (amax is None or block_amax.shape != (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)):
        raise ValueError(
            f"block_amax needs an amax and one value per block of {list(x.shape)}, not shape {list(block_amax.shape)}"
        )
    _, q = implementation(impl, x.device).run(x, amax, block_amax, want_values=False, want_codes=True)
    assert q is not None
    return q


@torch.no_grad()
def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, impl: Impl = "auto") -> Tensor:
    """The values of ``q``, ``dtype`` [..., K]: ``e2m1 * (block_scale * global_scale)`` in float32, rounded once."""
    return implementation(impl, q.codes.device).dequantize(q, dtype)


def fake_quantize(x: Tensor, amax: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """``dequantize(quantize(x, amax), x.dtype)`` in all bits; the gradient passes straight through, unchanged.

    Arguments, sharding and errors as in ``quantize``. The gradient reaches ``x`` also where a value saturated.
    """
    check_quantizable(x, amax)
    with torch.no_grad():  # an amax that is being learned gets its gradient from its own layer, not from here
        values, _ = implementation(impl, x.device).run(x, amax, want_values=True, want_codes=False)
    assert values is not None
    return straight_through(x, values) if torch.is_grad_enabled() and x.requires_grad else values


@torch.no_grad()
def fake_quantize_packed(x: Tensor, amax: Tensor | None = None, *, impl: Impl = "auto") -> tuple[Tensor, NVFP4Tensor]:
    """``fake_quantize(x)`` together with the NVFP4 tensor it is the value of, for one pass over ``x``.

    For use inside a ``torch.autograd.Function`` that computes with the first and saves the second for backward, at
    4.5 bits per element instead of 16. No gradient flows through it.
    """
    check_quantizable(x, amax)
    values, q = implementation(impl, x.device).run(x, amax, want_values=True, want_codes=True)
    assert values is not None
    assert q is not None
    return values, q


@torch.no_grad()
def row_amax(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Largest magnitude of each row of ``x`` [..., K] as float32 ``[..., 1]``; NaN where the row holds one.

    For the dtypes of ``quantize``, and any K.
    """
    return implementation(impl, x.device).row_amax(x)
