"""Rotary position embeddings: what a family says of them, and the tables that attention multiplies with.

The frequencies of the scaled forms (linear, dynamic, yarn, llama3, longrope) come from transformers' own functions, so
that they are the numbers that every reader of the checkpoint computes with.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaqad.errors import UserError

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Rotary:
    """One rotary embedding; layers that share it share the object."""

    dim: int
    """Leading dims of a head that are rotated."""
    head_dim: int
    theta: float
    kind: str
    """transformers' ``rope_type``."""
    config: Any
    """transformers' configuration of the model, which its functions read."""
    layer_type: str | None = None
    """Whose settings are meant where the configuration has several."""
    wide: bool = False
    """Whether queries and keys are rotated in FP32 and rounded then; else cosines and sines are rounded before."""

    def frequencies(self, length: int) -> tuple[Tensor, float]:
        """Inverse frequencies float32 [dim / 2] for sequences of ``length``, and what cosines and sines are multiplied
        by."""
        if self.kind == "default":
            steps = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
            return 1.0 / (self.theta**steps), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self.kind not in ROPE_INIT_FUNCTIONS:
            raise UserError(f"rope_type={self.kind!r} is not one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")
        kinds = {} if self.layer_type is None else {"layer_type": self.layer_type}
        inverse, scaling = ROPE_INIT_FUNCTIONS[self.kind](self.config, torch.device("cpu"), seq_len=length, **kinds)
        return inverse, float(scaling)

    def check(self, longest: int) -> None:
        """Whether the settings give frequencies, for short sequences and for those of ``longest``: some forms differ.

        Raises:
            UserError: a head without pairs of dims to rotate, frequencies that are not finite.
            Exception: whatever transformers' functions raise over settings that they cannot use.
        """
        for length in (1, longest):
            inverse, scaling = self.frequencies(length)
            if 2 * len(inverse) > self.head_dim:
                raise UserError(
                    f"rotary embeddings of {2 * len(inverse)} dims do not fit heads of head_dim={self.head_dim}; they "
                    "rotate pairs of dims: make head_dim even"
                )
            if not bool(inverse.isfinite().all()) or not math.isfinite(scaling):
                raise UserError(f"the rotary settings (rope_type={self.kind}) give frequencies that are not finite")

    def table(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to length - 1: [s, 1, 1, dim] each, computed in FP32."""
        inverse, scaling = self.frequencies(length)
        inverse = inverse.to(device)
        angles = torch.outer(torch.arange(length, device=device, dtype=inverse.dtype), inverse)
        both = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)


class Tables:
    """What the layers of one chunk multiply with, position by position, kept for the length that was asked for last."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, torch.dtype], tuple[int, Any]] = {}
        self.length = 0
        """Of the sequences of the current microbatch, on all tensor-parallel ranks together."""

    def of(self, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """``Rotary.table`` for sequences of ``length``."""
        dtype = torch.float32 if rotary.wide else dtype
        return self.kept(rotary, dtype, lambda: rotary.table(self.length, dtype, device))

    def kept(self, key: Hashable, dtype: torch.dtype, make: Callable[[], Made]) -> Made:
        """What ``make`` gives for ``length``, made once for all layers and microbatches."""
        length, made = self._kept.get((key, dtype), (0, None))
        if made is None or length != self.length:
            made = make()
            self._kept[key, dtype] = (self.length, made)
        found: Made = made
        return found
