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
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megaqad.distillation.forward import forward_hidden
from megaqad.errors import UserError
from megaqad.models.build import build_model
from megaqad.models.causal_lm import CausalLM
from megaqad.models.families import describe_model
from megaqad.models.load import ReadStatistics, load_weights
from megaqad.models.model import Model
from megaqad.models.shared_heads import sum_shared_gradients
from megaqad.models.write import Cast, save_pretrained, stream_tensors
from megaqad.runtime.ranks import ParallelSizes, Ranks, parallel
from megaqad.runtime.schedule import run_schedule


def loaded_model(folder: Path, ranks: Ranks, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """Every parameter is poisoned first, so that one that is not loaded shows."""
    model = build_model(describe_model(folder), ranks, dtype=dtype, **options)
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    load_weights(model, folder)
    return model


def run_hidden(model: Model, tokens: np.ndarray) -> list[Tensor]:
    """Last hidden states [s, b, h] of each microbatch on the last stage, nothing elsewhere."""
    return forward_hidden(model, list(torch.from_numpy(tokens).split(1)))


def local_logits(rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray) -> Any:
    """(vocab_start, logits [b, s, local V]) on the ranks of the last stage, None elsewhere."""
    with parallel(sizes) as ranks, torch.no_grad():
        model = loaded_model(folder, ranks)
        hidden = run_hidden(model, tokens)
        if not ranks.is_last_stage:
            return None
        last = model.last
        whole = torch.cat(hidden, 1)
        if last.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=ranks.tensor_group)
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
    with parallel(sizes) as ranks:
        loaded = loaded_model(folder, ranks, recompute=batch["recompute"])
        chunks = loaded.chunks
        ddp = [
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                chunk,
                pg_collection=ranks.groups,
            )
            for chunk in chunks
        ]

        def finish(*args: Any, **kwargs: Any) -> None:
            finalize_model_grads(*args, **kwargs)
            sum_shared_gradients(loaded)

        chunks[0].config.finalize_model_grads_func = finish

        def forward_step(data: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            tokens, weight = next(data)
            return model(tokens), lambda hidden: loss_of(model.module, hidden, weight)

        def loss_of(model: CausalLM, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, dict]:
            if model.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=ranks.tensor_group)
            else:
                hidden = copy_to_tensor_model_parallel_region(hidden, group=ranks.tensor_group)
            head = model.head_weight()
            logits = torch.einsum("sbh,vh->bsv", hidden, head)
            local = weight[..., model.vocab_start : model.vocab_start + head.shape[0]]
            return (logits * local).sum(), torch.tensor(local[..., 0].numel(), dtype=torch.int), {}

        batches = list(zip(torch.from_numpy(tokens).split(1), torch.from_numpy(weights).split(1), strict=True))
        shape = (1, tokens.shape[1])
        run_schedule(ranks, ddp, forward_step, batches, config=chunks[0].config, shape=shape, forward_only=False)
        for chunk in chunks:  # the writer takes parameters apart, so it can take their gradients apart
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        return {name: tensor.numpy() for name, tensor in stream_tensors(loaded, Cast(torch.float32))}


def round_trip(rank: int, world: int, folder: Path, sizes: ParallelSizes, save: dict[str, Any]) -> ReadStatistics:
    """Import and save again; what this rank read. ``save``: arguments of ``save_pretrained``."""
    with parallel(sizes) as ranks:
        model = build_model(describe_model(folder), ranks, dtype=torch.bfloat16)
        statistics = load_weights(model, folder)
        save_pretrained(model, model_dir=folder, **save)
        return statistics


def refused_round_trip(rank: int, world: int, folder: Path, sizes: ParallelSizes, save: dict[str, Any]) -> str:
    """The message by which saving is refused on this rank; returned, so that the pool of ranks lives on."""
    try:
        round_trip(rank, world, folder, sizes, save)
    except UserError as error:
        return str(error)
    return "not refused"
