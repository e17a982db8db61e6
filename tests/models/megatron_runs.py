"""What the ranks do in the model tests: build, load, run through Megatron's schedules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megaqad.models.build import build_model, transformer_config
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import describe_model
from megaqad.models.hf_reader import load_weights
from megaqad.runtime.parallel import ParallelContext, ParallelSizes, parallel


def loaded_model(
    folder: Path, context: ParallelContext, dtype: torch.dtype = torch.float32, **options: Any
) -> list[CausalLM]:
    """Chunks with every parameter poisoned first, so that one that is not loaded shows."""
    description = describe_model(folder)
    chunks = build_model(description, transformer_config(description, context.sizes, dtype=dtype, **options), context)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_weights(chunks, description, folder)
    return chunks


def microbatches(tokens: np.ndarray, size: int = 1) -> Iterator[Tensor]:
    return iter(torch.from_numpy(tokens).split(size))


def run_hidden(chunks: list[CausalLM], tokens: np.ndarray) -> list[Tensor]:
    """Last hidden states [s, b, h] of each microbatch on the last stage, nothing elsewhere."""

    def forward_step(data: Iterator[Tensor], model: CausalLM) -> tuple[Tensor, Any]:
        return model(next(data)), lambda output, non_loss_data: output

    config = chunks[0].config
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[microbatches(tokens) for _ in chunks] if len(chunks) > 1 else microbatches(tokens),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(tokens),
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def local_logits(rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray) -> Any:
    """(vocab_start, logits [b, s, local V]) on the ranks of the last stage, None elsewhere."""
    with parallel(sizes) as context, torch.no_grad():
        chunks = loaded_model(folder, context)
        hidden = run_hidden(chunks, tokens)
        if not context.is_last_stage:
            return None
        last = chunks[-1]
        whole = torch.cat(hidden, 1)
        if last.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=context.tensor_group)
        logits = torch.einsum("sbh,vh->bsv", whole.float(), last.head_weight().float())
        return last.vocab_start, logits.numpy()


def whole_logits(results: list[Any]) -> Tensor:
    """Logits [b, s, V] from what the ranks returned."""
    shards = dict(result for result in results if result is not None)
    return torch.from_numpy(np.concatenate([shards[start] for start in sorted(shards)], axis=-1))
