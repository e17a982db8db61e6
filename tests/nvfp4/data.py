"""The tensors that every NVFP4 test runs over: each kind breaks a different careless implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
SHAPE = (96, 160)


def _normal(scale: float) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(SHAPE, generator=g) * scale


def _ratio_of_normals(g: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=g) / torch.randn(SHAPE, generator=g)


def _student_t2(g: torch.Generator) -> Tensor:
    chi2 = torch.randn((2, *SHAPE), generator=g).square().sum(0)
    return torch.randn(SHAPE, generator=g) / (chi2 / 2).sqrt()


def _one_outlier(size: float) -> Callable[[torch.Generator], Tensor]:
    def make(g: torch.Generator) -> Tensor:
        x = torch.randn(SHAPE, generator=g)
        x[3, 7] = size
        return x

    return make


def _zero_blocks(g: torch.Generator) -> Tensor:
    x = torch.randn(SHAPE, generator=g).view(-1, 16)
    x[torch.rand(len(x), generator=g) < 0.25] = 0.0
    return x.view(SHAPE)


def _grid_and_midpoints(g: torch.Generator) -> Tensor:
    """Blocks whose scales are powers of two and whose elements are exact ties or exact grid values, of both signs."""
    points = torch.tensor([*MIDPOINTS, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    picks = torch.randint(0, len(points), SHAPE, generator=g)
    signs = 1 - 2 * torch.randint(0, 2, SHAPE, generator=g)
    x = (points[picks] * signs).view(-1, 16)
    x[:, 0] = 6.0
    x *= 2.0 ** torch.randint(-4, 5, (len(x), 1), generator=g)
    x[0, 1] = 2688.0  # a global scale of exactly 1
    return x.view(SHAPE)


def _small_integers(g: torch.Generator) -> Tensor:
    """Few distinct ratios to the amax: many quotients are ties of the block scale."""
    return torch.randint(-12, 13, SHAPE, generator=g) / 4.0


def _minus_zeros(g: torch.Generator) -> Tensor:
    x = torch.randn(SHAPE, generator=g)
    x[torch.rand(SHAPE, generator=g) < 0.3] = -0.0
    x[torch.rand(SHAPE, generator=g) < 0.3] *= -1e-6
    return x


def _every_magnitude(g: torch.Generator) -> Tensor:
    """Exponents spread over sixty binades: block scales underflow, elements underflow, quotients become minus zero."""
    return torch.randn(SHAPE, generator=g) * 2.0 ** torch.randint(-50, 11, SHAPE, generator=g)


def _subnormals(g: torch.Generator) -> Tensor:
    """Subnormal numbers of the float32 range beside huge ones, where float32 quotients underflow."""
    x = torch.randn(SHAPE, generator=g) * 1e-39
    x[1] *= 1e38
    x[2, ::5] = 1e30
    return x


KINDS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal(1.0),
    "weights": _normal(0.02),
    "student_t2": _student_t2,
    "cauchy": _ratio_of_normals,
    "tiny": _normal(1e-6),
    "tinier": _normal(1e-22),
    "large": _normal(5e3),
    "huge": _normal(1e36),
    "outlier_5e4": _one_outlier(5e4),
    "outlier_1e7": _one_outlier(1e7),
    "zero_blocks": _zero_blocks,
    "grid_and_midpoints": _grid_and_midpoints,
    "small_integers": _small_integers,
    "minus_zeros": _minus_zeros,
    "every_magnitude": _every_magnitude,
    "subnormals": _subnormals,
}
"""Kinds whose largest magnitude is far above the floor of the global scale, where ModelOpt's bytes are ours."""

DEGENERATE: dict[str, Callable[[torch.Generator], Tensor]] = {
    "all_zero": lambda g: torch.zeros(SHAPE),
    "all_minus_zero": lambda g: -torch.zeros(SHAPE),
    "below_the_floor": _normal(1e-35),
    "one_subnormal": lambda g: torch.zeros(SHAPE).index_put_((torch.tensor(2), torch.tensor(5)), torch.tensor(1e-44)),
}
"""Kinds that only the floor of the global scale keeps finite."""


def make(kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """One tensor of ``SHAPE`` of that kind; values beyond the dtype's range are held at its largest number."""
    x = {**KINDS, **DEGENERATE}[kind](torch.Generator().manual_seed(seed))
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def raw(t: Tensor) -> Tensor:
    """The tensor's bytes, so that equality means equality of bits."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Same dtype, same shape, same bits."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    different = int((raw(a) != raw(b)).sum())
    assert different == 0, f"{different} of {a.nbytes} bytes differ"
