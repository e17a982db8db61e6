"""Forward-only passes: token ids in, last hidden states out, through every pipeline stage.

The teacher pass of distillation, calibration, evaluation and the ``logits`` command are all this one function. Last
hidden states are what models hand over, never logits: they are tens of times smaller, and with the output head they
give the exact logits again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaqad.models.causal_lm import CausalLM


@torch.no_grad()
def forward_hidden(
    chunks: Sequence[CausalLM], tokens: Sequence[Tensor], *, before: Callable[[CausalLM, int], None] | None = None
) -> list[Tensor]:
    """Run microbatches through the pipeline without gradients.

    Args:
        chunks: this rank's virtual pipeline chunks of ``CausalLM``.
        tokens: int64 [b, s], one per microbatch, all of one shape, the same on every tensor and pipeline rank.
        before: called when a chunk is about to run a microbatch, with both; numbers from ``len(tokens)`` on are those
            that an interleaved schedule repeats.

    Returns:
        On the last pipeline stage one [s, b, h] per microbatch, in order, in the model's dtype; under sequence
        parallelism this rank's slice [s/tp, b, h]. On the other stages an empty list.

    Collectives: the pipeline's point-to-point sends and those of the layers.
    """
    if not tokens:
        return []
    micro_batch_size, sequence_length = tokens[0].shape
    # The interleaved schedule takes a multiple of the stages: the last microbatch runs again, its result is dropped.
    stages = chunks[0].config.pipeline_model_parallel_size if len(chunks) > 1 else 1
    scheduled = [*tokens, *[tokens[-1]] * (-len(tokens) % stages)]

    def forward_step(batches: Iterator[tuple[int, Tensor]], model: CausalLM) -> tuple[Tensor, Any]:
        def keep(hidden: Tensor, non_loss_data: bool) -> Tensor:
            assert non_loss_data
            return hidden

        number, batch = next(batches)
        if before is not None:
            before(model, number)
        return model(batch), keep

    # Every virtual chunk reads the same microbatches in the same order, each from an iterator of its own.
    iterators = [enumerate(scheduled) for _ in chunks]
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    hidden = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(scheduled),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    return list(hidden)[: len(tokens)]


def flatten_tokens(values: Tensor) -> Tensor:
    """[b, s] per-token values -> [s * b], the order in which hidden states [s, b, h] are flattened."""
    return values.transpose(0, 1).reshape(-1)
