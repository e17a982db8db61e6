"""What the ranks do in the export tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megaqad.distillation.forward import forward_hidden
from megaqad.errors import UserError
from megaqad.export.checkpoint import Quantization, export_checkpoint
from megaqad.export.reference import student_reference
from megaqad.models.build import build_model, transformer_config
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import describe_model
from megaqad.models.hf_reader import load_weights
from megaqad.quantization.formats import CHOICES
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.state import cache_amaxes, input_amaxes
from megaqad.runtime.ranks import Ranks, ParallelSizes, parallel
from tests.models.megatron_runs import whole_logits
from tests.quantization.models import calibrated_student


def export_weights(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> None:
    """Export a loaded checkpoint. ``options``: output_dir, formats (names by module), input_amax, kv_cache, cache_amax,
    dtype, spoil, max_file_bytes."""
    with parallel(sizes) as context:
        description = describe_model(folder)
        config = transformer_config(description, sizes, dtype=options.pop("dtype", torch.bfloat16))
        chunks = build_model(description, config, context)
        load_weights(chunks, description, folder)
        spoil = options.pop("spoil", None)
        if spoil is not None and rank == world - 1:
            chunks[-1].decoder.layers[-1].mlp.linear_fc2.weight.data[3, 5] = spoil
        quantization = Quantization(
            {name: CHOICES[choice] for name, choice in options.pop("formats").items()},
            options.pop("input_amax", {}),
            options.pop("kv_cache", "none"),
            options.pop("cache_amax", {}),
        )
        export_checkpoint(chunks, description, context, model_dir=folder, quantization=quantization, **options)


def refused_export(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> str:
    """The message by which this rank's export is refused; returned, so that the pool of ranks lives on."""
    try:
        export_weights(rank, world, folder, sizes, options)
    except UserError as error:
        return str(error)
    return "not refused"


def gathered_logits(chunks: list[CausalLM], context: Ranks, tokens: np.ndarray) -> Tensor | None:
    """FP32 logits [b, s, V] on the main rank."""
    hidden = forward_hidden(chunks, list(torch.from_numpy(tokens).split(1)))
    local: tuple[int, np.ndarray] | None = None
    if context.is_last_stage:
        whole: Tensor = torch.cat(hidden, 1)
        if context.sizes.sequence:
            whole = gather_from_sequence_parallel_region(whole, group=context.tensor_group)
        logits = torch.einsum("sbh,vh->bsv", whole.float(), chunks[-1].head_weight().detach().float())
        local = chunks[-1].vocab_start, logits.numpy()
    shards: list[Any] = [None] * context.world_size
    dist.all_gather_object(shards, local)
    return whole_logits(shards) if context.is_main else None


def calibrate_and_export(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> Any:
    """The student of a recipe: calibrated and exported; what ``verify`` compares with, from the main rank.

    ``options``: output_dir, settings (QuantizationSettings arguments), dtype, tokens, layout.
    """
    with parallel(sizes) as context:
        tokens = options["tokens"]
        settings = QuantizationSettings(**options["settings"])
        chunks, description, recipe = calibrated_student(context, folder, settings, tokens, options["dtype"])

        def logits_of(model: list[CausalLM]) -> Tensor | None:
            return gathered_logits(model, context, tokens)

        reference = student_reference(chunks, description, context, recipe, logits_of)
        export_checkpoint(
            chunks,
            description,
            context,
            options["output_dir"],
            model_dir=folder,
            quantization=Quantization(recipe.formats, input_amaxes(chunks), recipe.kv_cache, cache_amaxes(chunks)),
            layout=options.get("layout", "modelopt"),
        )
        return reference
