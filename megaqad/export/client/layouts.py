"""How the parts of an export lie in its files, as a reader must take them."""

from collections.abc import Callable, Iterable, Mapping
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

    @property
    def block(self) -> int:
        """Elements of K that share a scale; 1 where the whole tensor does."""
        return max(1, *(covers for ending, (_, covers) in self.tensors.items() if ending.endswith("scale")))


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
    excluded: tuple[str, ...] = ()
    """What the files list as not quantized, where they do: engines look for these as parts of names too."""


def attention_modules(linears: Iterable[str]) -> list[str]:
    """The modules that hold projections of keys, alone or fused with others."""
    return [parent for parent, _, leaf in (name.rpartition(".") for name in linears) if leaf in ("k_proj", "qkv_proj")]
