"""Forward-only passes: token ids in, last hidden states out, through every pipeline stage.

The teacher pass of distillation, calibration, evaluation and the ``logits`` command are all this one function. Last
hidden states are what models hand over, never logits: they are tens of times smaller, and with the output head they
give the exact logits again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megaqad.models.causal_lm import CausalLM
from megaqad.models.model import Model
from megaqad.runtime.schedule import run_schedule


@torch.no_grad()
def forward_hidden(
    model: Model, tokens: Sequence[Tensor], *, before: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Run microbatches through the pipeline without gradients.

    Args:
        tokens: int64 [b, s], one per microbatch, all of one shape, the same on every tensor and pipeline rank.
        before: called with its number when a chunk of this rank is about to run a microbatch; numbers from
            ``len(tokens)`` on are those that an interleaved schedule repeats.

    Returns:
        On the last pipeline stage one [s, b, h] per microbatch, in order, in the model's dtype; under sequence
        parallelism this rank's slice [s/tp, b, h]. On the other stages an empty list.

    Collectives: the pipeline's point-to-point sends and those of the layers.
    """
    if not tokens:
        return []
    chunks = model.chunks
    batch_size, length = tokens[0].shape
    # The interleaved schedule takes a multiple of the stages: the last microbatch runs again, its result is dropped.
    stages = model.ranks.sizes.pipeline if len(chunks) > 1 else 1
    scheduled = [*tokens, *[tokens[-1]] * (-len(tokens) % stages)]

    def forward_step(batches: Iterator[tuple[int, Tensor]], chunk: CausalLM) -> tuple[Tensor, Any]:
        def keep(hidden: Tensor, non_loss_data: bool) -> Tensor:
            assert non_loss_data
            return hidden

        number, batch = next(batches)
        if before is not None:
            before(number)
        return chunk(batch), keep

    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    hidden: list[Tensor] = run_schedule(
        model.ranks,
        chunks,
        forward_step,
        list(enumerate(scheduled)),
        config=chunks[0].config,
        shape=(batch_size, length),
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    return hidden[: len(tokens)]
