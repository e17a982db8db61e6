"""What the ranks do in the model tests: build, load, run through Megatron's schedules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megaqad.errors import UserError
from megaqad.models.build import build_model, transformer_config
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import describe_model
from megaqad.models.hf_reader import ReadStatistics, load_weights
from megaqad.models.hf_writer import iter_hf_tensors, save_pretrained
from megaqad.runtime.ranks import Ranks, ParallelSizes, parallel


def loaded_model(folder: Path, context: Ranks, dtype: torch.dtype = torch.float32, **options: Any) -> list[CausalLM]:
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


def logit_gradients(
    rank: int, world: int, folder: Path, sizes: ParallelSizes, batch: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Gradient of sum(weights * logits) / tokens by Hugging Face name, on the main rank.

    The whole training path of Megatron-Core runs: DDP buffers, the pipeline schedule, the reductions over tensor,
    sequence and embedding groups. ``batch``: tokens [b, s], weights float32 [b, s, V], recompute.
    """
    tokens, weights = batch["tokens"], batch["weights"]
    with parallel(sizes) as context:
        chunks = loaded_model(folder, context, recompute=batch["recompute"])
        ddp = [
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                chunk,
                pg_collection=context.groups,
            )
            for chunk in chunks
        ]
        chunks[0].config.finalize_model_grads_func = finalize_model_grads

        def forward_step(data: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            tokens, weight = next(data)
            return model(tokens), lambda hidden: loss_of(model.module, hidden, weight)

        def loss_of(model: CausalLM, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, dict]:
            if model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=context.tensor_group)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=context.tensor_group)
            head = model.head_weight()
            logits = torch.einsum("sbh,vh->bsv", hidden, head)
            local = weight[..., model.vocab_start : model.vocab_start + head.shape[0]]
            return (logits * local).sum(), torch.tensor(local[..., 0].numel(), dtype=torch.int), {}

        batches = list(zip(torch.from_numpy(tokens).split(1), torch.from_numpy(weights).split(1), strict=True))
        iterators = [iter(batches) for _ in ddp]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(ddp) > 1 else iterators[0],
            model=ddp if len(ddp) > 1 else ddp[0],
            num_microbatches=len(batches),
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        for chunk in chunks:  # the writer takes parameters apart, so it can take their gradients apart
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        description = describe_model(folder)
        return {
            name: tensor.numpy() for name, tensor in iter_hf_tensors(chunks, description, context, dtype=torch.float32)
        }


def round_trip(rank: int, world: int, folder: Path, sizes: ParallelSizes, save: dict[str, Any]) -> ReadStatistics:
    """Import and save again; what this rank read. ``save``: arguments of ``save_pretrained``."""
    with parallel(sizes) as context:
        description = describe_model(folder)
        config = transformer_config(description, sizes, dtype=torch.bfloat16)
        chunks = build_model(description, config, context)
        statistics = load_weights(chunks, description, folder)
        save_pretrained(chunks, description, context, model_dir=folder, **save)
        return statistics


def refused_round_trip(rank: int, world: int, folder: Path, sizes: ParallelSizes, save: dict[str, Any]) -> str:
    """The message by which saving is refused on this rank; returned, so that the pool of ranks lives on."""
    try:
        round_trip(rank, world, folder, sizes, save)
    except UserError as error:
        return str(error)
    return "not refused"
