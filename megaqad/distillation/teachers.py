"""Where the teacher's last hidden states come from; the step does not care.

| teacher | its pass | what it holds |
|---|---|---|
| `LiveTeacher` | forward only through its own chunks | a second model |
| `SelfTeacher` | the student's chunks, quantizers off, trained weights set back | the trained weights' originals |
| `CachedTeacher` | none: hidden states from files, made once by another teacher | its output head |

All give last hidden states `[s(/tp), b, h]` on the last pipeline stage and the output head they belong to, so the loss
is the same function of the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from megaqad.distillation.cache import HiddenCache
from megaqad.distillation.forward import forward_hidden
from megaqad.models.model import Model, QuantizerParameter
from megaqad.quantization.model import sites
from megaqad.quantization.site import QuantizerMode
from megaqad.runtime.ranks import Ranks


class Teacher(Protocol):
    """A frozen model, seen from its end."""

    @property
    def model(self) -> Model | None:
        """Its layers; None where only hidden states are known."""

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """As ``forward_hidden``: tokens int64 [b, s] per microbatch -> [s(/tp), b, h] on the last stage, else []."""

    def head_weight(self) -> Tensor:
        """This rank's rows of the output head, without gradient; on the last stage only."""


class LiveTeacher:
    """A model of its own, in the student's layout but with any number of layers and any width."""

    def __init__(self, model: Model, *, sequences: int = 1) -> None:
        """
        Args:
            model: frozen.
            sequences: microbatches go through it together up to so many sequences, since it keeps nothing for a
                backward pass; at least one microbatch does, and as many parts as there are pipeline stages.
        """
        self.model, self._sequences = model, sequences

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        each = len(tokens[0])
        most = min(self._sequences // each, len(tokens) // self.model.ranks.sizes.pipeline)
        several = max((count for count in range(1, most + 1) if len(tokens) % count == 0), default=1)
        if several == 1:
            return forward_hidden(self.model, tokens)
        parts = [torch.cat(list(tokens[first : first + several])) for first in range(0, len(tokens), several)]
        return [hidden for part in forward_hidden(self.model, parts) for hidden in part.split(each, dim=1)]

    def head_weight(self) -> Tensor:
        return self.model.last.head_weight().detach()


class SelfTeacher:
    """The student as it was before training: quantizers off, trained weights at their original values.

    For the length of a pass the ``data`` of each trained parameter is exchanged for its original, then exchanged back.
    The contents stay where they are: nothing is copied, and whatever holds the storage of the trained values does not
    notice, be it Megatron-Core's contiguous parameter buffer, the distributed optimizer's views of it, or a checkpoint
    on its way to disk. Quantized copies of weights survive too: they are made when weights change only, and a layer
    whose quantizers are off does not look at its own.
    """

    def __init__(self, student: Model, originals: Sequence[tuple[Tensor, Tensor]]) -> None:
        """
        Args:
            student: bare, not in DDP.
            originals: every trained weight on this rank with its value in the original model, in the parameter's
                shape, dtype and sharding (``load.original_values``). Learned scales are not among them: they are
                not read when quantizers are off.
        """
        self.model = student
        self._originals = list(originals)
        self._head: Tensor | None = None
        kept = {id(parameter) for parameter, _ in self._originals}
        for chunk in student.chunks:
            for name, parameter in chunk.named_parameters():
                frozen = not parameter.requires_grad or isinstance(parameter, QuantizerParameter)
                assert frozen or id(parameter) in kept, f"{name} is trained and would move the teacher with it"

    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        with self._as_it_was():
            return forward_hidden(self.model, tokens)

    def head_weight(self) -> Tensor:
        if self._head is None:  # a view of storage that stays, so no exchange is needed in the student's pass
            with self._as_it_was():
                self._head = self.model.last.head_weight().detach()
        return self._head

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """For the length of a ``with`` block the chunks are the original; then they are as before, whatever happens."""
        modes = [(site, site.mode) for site in sites(self.model)]
        trained = [parameter.data for parameter, _ in self._originals]
        try:
            for parameter, original in self._originals:
                parameter.data = original
            for site, _ in modes:
                site.mode = QuantizerMode.OFF
            yield
        finally:
            for (parameter, _), values in zip(self._originals, trained, strict=True):
                parameter.data = values
            for site, mode in modes:
                site.mode = mode


class CachedTeacher:
    """Hidden states from a cache; what it lacks is computed once, by the teacher it was made for, and kept."""

    model = None

    def __init__(self, cache: HiddenCache, head: Tensor | None, make: Callable[[], Teacher], ranks: Ranks) -> None:
        """
        Args:
            cache: of this teacher and these data.
            head: this rank's rows of the teacher's head on the last stage, None elsewhere.
            make: builds the live teacher; called on the first tokens that the cache lacks, and never if it lacks none.
        """
        self._cache, self._head, self._make, self._ranks = cache, head, make, ranks
        self._live: Teacher | None = None

    @torch.no_grad()
    def last_hidden(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        if self._cache.has_all(tokens):
            return self._cache.read(tokens) if self._ranks.is_last_stage else []
        if self._live is None:
            self._live = self._make()
        hidden = self._live.last_hidden(tokens)
        self._cache.write(tokens, hidden)
        return hidden

    def head_weight(self) -> Tensor:
        assert self._head is not None, "only the last stage has the head"
        return self._head
