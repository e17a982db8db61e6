"""How the parts of an export lie in its files, as a reader must take them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a quantized linear module of shape [N, K] is stored."""

    tensors: dict[str, tuple[torch.dtype, int]]
    """dtype by ending, and how many of K one element covers; 0 for a scale of the whole tensor."""
    read: Callable[..., Tensor]
    """float32 [N, K] from the tensors, that of inputs left out."""
    round_input: Callable[..., Tensor] | None
    """An input as the engine multiplies it, from the input and, where there is one, the stored scale; None where inputs
    stay as they are."""
    input_scale: str | None = None
    """Ending of the stored scale of inputs, if there is one."""
    amax: Callable[[float], float] = float
    """The calibrated amax that a stored input scale stands for."""
    scalar: tuple[int, ...] = ()
    """Shape of the scale of a whole tensor."""


@dataclass(frozen=True)
class CacheLayout:
    """How the scales of a quantized KV cache are stored."""

    round: Callable[[Tensor, Tensor], Tensor]
    """Keys or values as attention sees them, from what was computed and the stored scale."""
    modules: dict[str, str]
    """Module whose outputs it scales, by the name of each scale."""
    optional: bool
    """Whether scales may be missing, all of them: then they are 1."""
    scalar: tuple[int, ...] = ()
    """Shape of a scale."""


@dataclass(frozen=True)
class Declared:
    """What the configuration files say."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Of the quantized modules, in model order."""
    cache: CacheLayout | None = None
