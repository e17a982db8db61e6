"""NVFP4 itself: the numbers, the two levels of scale, the packed tensor, and what every implementation must agree on.

A value is stored in four bits as E2M1: a sign and one of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Sixteen neighbours
along the last dimension share a block scale in FP8 E4M3, and the whole tensor shares one float32 global scale:

    value = e2m1(code) * block_scale * global_scale                    4 + 8/16 = 4.5 bits per element

The global scale is ``amax / (6 * 448)``, so that the block which holds the tensor's largest magnitude gets the largest
block scale, 448, and that magnitude becomes exactly 6. All arithmetic is float32 whatever the input's dtype; rounding
is to nearest, ties to even, at both levels. This is the division form that ModelOpt writes into checkpoints, operation
for operation, because two correct formulas that differ in one rounding disagree on a few codes in every thousand.

Where ModelOpt divides by zero, or nearly, this module holds a floor instead: a global scale is never below
``MIN_GLOBAL_SCALE``. Above it (any tensor whose amax exceeds 2.2e-27) the bytes are ModelOpt's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16
"""Elements along the last dimension that share one block scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code 0 to 7; codes 8 to 15 are the same with a minus sign. Code 8, minus zero, is
what a small negative element rounds to; it is read as plain 0."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9

MIN_GLOBAL_SCALE = 2.0**-100
"""Keeps ``block_scale * global_scale`` a normal float32 and its reciprocal finite, for any block scale."""

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class NVFP4Tensor:
    """A tensor ``[..., K]`` in NVFP4, laid out as checkpoints store it."""

    codes: Tensor
    """uint8 ``[..., K // 2]``: two E2M1 codes per byte, the element with the even index in the low nibble."""

    block_scales: Tensor
    """float8_e4m3fn ``[..., K // 16]``: never negative, never zero; a block of zeros has 1.0."""

    global_scale: Tensor
    """float32 ``[]``: the tensor's amax / 2688, shared by tensors that an engine fuses; ``[..., 1]`` when each row has
    its own."""

    @property
    def shape(self) -> torch.Size:
        """Shape ``[..., K]`` of the tensor that these codes stand for."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes held: 0.5625 per element, and four per global scale."""
        return self.codes.nbytes + self.block_scales.nbytes + self.global_scale.nbytes


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude in ``x`` (any shape) as float32 ``[]``; 0 for an empty tensor, NaN if ``x`` holds one."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def global_scale_from_amax(amax: Tensor) -> Tensor:
    """The second-level scale ``amax / 2688``, float32 in the shape of ``amax``, never below ``MIN_GLOBAL_SCALE``.

    The divisor is a tensor on purpose: on CUDA, PyTorch turns division by a Python number into multiplication by its
    rounded reciprocal, which gives another float32 for more than a fifth of all amax values.
    """
    divisor = torch.full((), E2M1_MAX * E4M3_MAX, dtype=torch.float32, device=amax.device)
    return (amax.float() / divisor).clamp_min(MIN_GLOBAL_SCALE)


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and Inf, which NVFP4 cannot hold: one of either spoils its whole block, or the whole tensor.

    Waits for the device, so the quantizers do not call it; an exporter does, once per tensor.

    Raises:
        ValueError: names the tensor and how many of its elements are NaN and Inf.
    """
    if bool(torch.isfinite(tensor_amax(x))):
        return
    nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    raise ValueError(
        f"{name} {list(x.shape)} holds {nan} NaN and {inf} Inf values, which NVFP4 cannot represent: "
        "repair the tensor or leave it unquantized"
    )


def check_quantizable(x: Tensor, amax: Tensor | None) -> None:
    """Refuse what the format has no meaning for.

    Raises:
        ValueError: ``x`` is not BF16, FP16 or FP32; its last dimension does not divide into blocks of 16; or ``amax``
            is not one float32 number, or one per row, on the device of ``x``.
    """
    if x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"NVFP4 quantizes bfloat16, float16 and float32, not {x.dtype}: cast the tensor first")
    if x.dim() == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"NVFP4 needs a last dimension divisible by {BLOCK_SIZE}, not shape {list(x.shape)}: "
            "leave this tensor unquantized, or change the sharding if that is what made it so"
        )
    if amax is None:
        return
    per_row = (*x.shape[:-1], 1)
    if amax.shape not in ((), per_row) or amax.dtype != torch.float32 or amax.device != x.device:
        raise ValueError(
            f"amax must be a float32 tensor of shape [] or {list(per_row)} on {x.device}, "
            f"not {amax.dtype} of shape {list(amax.shape)} on {amax.device}"
        )
