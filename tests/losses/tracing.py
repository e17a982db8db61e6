"""Which collectives a piece of code issued, and the bytes each rank sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor
from torch import distributed as dist

from megaqad.losses import sharding


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """A list that grows by (kind, bytes sent) with every collective of `megaqad.losses`."""
    seen: list[tuple[str, int]] = []

    def recorded(kind, original, argument):
        def call(*args, **options):
            sent: Tensor = args[argument]
            seen.append((kind, sent.numel() * sent.element_size()))
            return original(*args, **options)

        return call

    with (
        mock.patch.object(sharding, "all_gather_single", recorded("all_gather", sharding.all_gather_single, 1)),
        mock.patch.object(
            sharding, "reduce_scatter_single", recorded("reduce_scatter", sharding.reduce_scatter_single, 1)
        ),
        mock.patch.object(dist, "all_reduce", recorded("all_reduce", dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded("all_gather", dist.all_gather, 1)),
    ):
        yield seen
