"""Where the teacher's last hidden states come from; the step does not care.

| teacher | its pass | what it holds |
|---|---|---|
| `LiveTeacher` | forward only through its own chunks | a second model |
| `SelfTeacher` | the student's chunks with their quantizers off | nothing |
| `CachedTeacher` | none: hidden states from files, made once by another teacher | its output head |

All give last hidden states `[s(/tp), b, h]` on the last pipeline stage and the output head they belong to, so the loss
is the same function of the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megaqad.distillation.cache import HiddenCache
from megaqad.distillation.forward import forward_hidden
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.attention import QuantizedCausalAttention
from megaqad.quantization.quantizers import QuantizerMode, Quantizers
from megaqad.quantization.state import quantized_caches, quantized_linears
from megaqad.runtime.agree import raise_together
from megaqad.runtime.parallel import ParallelContext


class Teacher(Protocol):
    """A frozen model, seen from its end."""

    chunks: Sequence[CausalLM]
    """Its layers on this rank; empty where only hidden states are known."""

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """As ``forward_hidden``: tokens int64 [b, s] per microbatch -> [s(/tp), b, h] on the last stage, else []."""

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, without gradient; on the last stage only."""


class LiveTeacher:
    """A model of its own, in the student's layout but with any number of layers and any width."""

    def __init__(self, chunks: Sequence[CausalLM]) -> None:
        """``chunks``: this rank's, frozen."""
        self.chunks: Sequence[CausalLM] = list(chunks)

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        return forward_hidden(self.chunks, tokens)

    def head_weight(self) -> Tensor:
        return self.chunks[-1].head_weight().detach()


class SelfTeacher:
    """The student without its quantizers. Right only while no weight that this pass reads is trained."""

    def __init__(self, student: Sequence[CausalLM]) -> None:
        """
        Args:
            student: this rank's chunks, bare.

        Collective: ``raise_together``, since a stage may hold no trained weight.

        Raises:
            UserError: a weight of the student is trained, which would move the teacher with it; the message names it.
        """
        self.chunks: Sequence[CausalLM] = list(student)
        raise_together(_trained_weight(student))

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        with _QuantizersOff(self.chunks):
            return forward_hidden(self.chunks, tokens)

    def head_weight(self) -> Tensor:
        with _QuantizersOff(self.chunks):
            return self.chunks[-1].head_weight().detach()


def _trained_weight(student: Sequence[CausalLM]) -> str | None:
    """Why the student cannot be its own teacher. Parameters of the quantizers are not read when they are off."""
    layers = set(quantized_linears(student))
    for chunk in student:
        for name, module in chunk.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                is_quantizers = module in layers and own not in ("weight", "bias")
                if parameter.requires_grad and not is_quantizers:
                    return (
                        f"distill.teacher=self needs weights that stay as they are, but {name}.{own} is trained: train "
                        "the scales only, or set distill.teacher=model"
                    )
    return None


class _QuantizersOff:
    """For the length of a ``with`` block the layers compute in BF16; then each is in its mode again."""

    def __init__(self, chunks: Sequence[CausalLM]) -> None:
        quantizers: list[Quantizers | QuantizedCausalAttention] = [
            *quantized_linears(chunks),
            *quantized_caches(chunks),
        ]
        self._modes = [(one, one.mode) for one in quantizers]

    def __enter__(self) -> None:
        for quantizer, _ in self._modes:
            quantizer.mode = QuantizerMode.OFF

    def __exit__(self, *_: object) -> None:
        for quantizer, mode in self._modes:
            quantizer.mode = mode


class CachedTeacher:
    """Hidden states from a cache; what it lacks is computed once, by the teacher it was made for, and kept."""

    chunks: Sequence[CausalLM] = ()

    def __init__(
        self, cache: HiddenCache, head: Tensor | None, make: Callable[[], Teacher], context: ParallelContext
    ) -> None:
        """
        Args:
            cache: of this teacher and these data.
            head: this rank's rows of the teacher's head on the last stage, None elsewhere.
            make: builds the live teacher; called on the first tokens that the cache lacks, and never if it lacks none.
        """
        self._cache, self._head, self._make, self._context = cache, head, make, context
        self._live: Teacher | None = None

    @torch.no_grad()
    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        if self._cache.has_all(tokens):
            return self._cache.read(tokens) if self._context.is_last_stage else []
        if self._live is None:
            self._live = self._make()
        hidden = self._live.last_hidden(tokens)
        self._cache.write(tokens, hidden)
        return hidden

    def head_weight(self) -> Tensor:
        assert self._head is not None, "only the last stage has the head"
        return self._head
