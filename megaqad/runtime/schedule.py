"""Megatron-Core's pipeline schedules, told which ranks to run on rather than left to look them up."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import nn

from megaqad.runtime.ranks import Ranks


def run_schedule(
    ranks: Ranks,
    chunks: Sequence[nn.Module],
    forward_step: Callable[..., Any],
    batches: Sequence[Any],
    *,
    config: Any,
    shape: tuple[int, int],
    **options: Any,
) -> list[Any]:
    """Run microbatches through the pipeline: 1F1B, interleaved 1F1B, or no pipeline at all.

    Args:
        chunks: this rank's, in the order of the virtual stages, in DDP for training.
        forward_step: (iterator over ``batches``, chunk) -> (output, what makes a loss of it), as Megatron-Core asks.
        batches: every chunk reads them in the same order, each from an iterator of its own.
        config: Megatron-Core's configuration of the model.
        shape: (b, s) of each microbatch.
        options: further arguments of the schedule, ``forward_only`` among them.

    Returns:
        On the last stage what the losses returned, in order; elsewhere nothing.
    """
    sizes = ranks.sizes
    if sizes.pipeline == 1:
        schedule = forward_backward_no_pipelining
    elif sizes.virtual_pipeline == 1:
        schedule = forward_backward_pipelining_without_interleaving
    else:
        schedule = forward_backward_pipelining_with_interleaving
    iterators: list[Iterator[Any]] = [iter(batches) for _ in chunks]
    found: list[Any] = schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        p2p_communicator=P2PCommunicator(ranks.pipeline_group, config) if sizes.pipeline > 1 else None,
        pg_collection=ranks.groups,
        **options,
    )
    return found
