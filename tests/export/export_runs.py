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
from megaqad.export.checkpoint import export_checkpoint
from megaqad.export.reference import student_reference
from megaqad.export.verify import verify
from megaqad.models.families import describe_model
from megaqad.models.load import load_weights
from megaqad.models.model import Model
from megaqad.quantization.model import build_quantized, cache_sites, switch, weight_sites
from megaqad.quantization.plan import plan_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.site import QuantizerMode
from megaqad.runtime.agree import on_main_for_long
from megaqad.runtime.ranks import ParallelSizes, Ranks, parallel
from tests.models.megatron_runs import whole_logits
from tests.quantization.models import calibrated_student


def export_weights(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> None:
    """Export a loaded checkpoint. ``options``: output_dir, formats (names by module), input_amax, kv_cache, cache_amax,
    dtype, spoil, max_file_bytes."""
    with parallel(sizes) as ranks:
        architecture = describe_model(folder)
        formats, kv_cache = options.pop("formats"), options.pop("kv_cache", "none")
        kept = [name for name in (*architecture.linear_modules, architecture.head) if name not in formats]
        settings = QuantizationSettings(exclude=kept, formats=formats, kv_cache=kv_cache)
        plan = plan_for(settings, architecture, sizes.tensor)
        model = build_quantized(architecture, ranks, plan, dtype=options.pop("dtype", torch.bfloat16))
        load_weights(model, folder)
        set_amaxes(model, options.pop("input_amax", {}), options.pop("cache_amax", {}))
        spoil = options.pop("spoil", None)
        if spoil is not None and rank == world - 1:
            model.last.layers[-1].mlp.block.linear_fc2.weight.data[3, 5] = spoil
        switch(model, QuantizerMode.ON)
        export_checkpoint(model, plan, model_dir=folder, **options)


def set_amaxes(model: Model, inputs: dict[str, float], caches: dict[str, float]) -> None:
    """Give a model's sites what another program calibrated; what is missing stays as it is."""
    for site in weight_sites(model):
        site.input_amax.fill_(inputs.get(site.module_names[0], 0.0))
    for site in cache_sites(model):
        for name, amax in zip(site.names, (site.key_amax, site.value_amax), strict=True):
            amax.fill_(caches.get(name, amax.item()))


def refused_export(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> str:
    """The message by which this rank's export is refused; returned, so that the pool of ranks lives on."""
    try:
        export_weights(rank, world, folder, sizes, options)
    except UserError as error:
        return str(error)
    return "not refused"


def gathered_logits(model: Model, ranks: Ranks, tokens: np.ndarray) -> Tensor | None:
    """FP32 logits [b, s, V] on the main rank."""
    hidden = forward_hidden(model, list(torch.from_numpy(tokens).split(1)))
    local: tuple[int, np.ndarray] | None = None
    if ranks.is_last_stage:
        whole: Tensor = torch.cat(hidden, 1)
        if ranks.sizes.sequence:
            whole = gather_from_sequence_parallel_region(whole, group=ranks.tensor_group)
        logits = torch.einsum("sbh,vh->bsv", whole.float(), model.last.head_weight().detach().float())
        local = model.last.vocab_start, logits.numpy()
    shards: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(shards, local)
    return whole_logits(shards) if ranks.is_main else None


def calibrate_and_export(rank: int, world: int, folder: Path, sizes: ParallelSizes, options: dict[str, Any]) -> Any:
    """The student of a recipe: calibrated and exported; what ``verify`` compares with, from the main rank.

    ``options``: output_dir, settings (QuantizationSettings arguments), dtype, tokens, layout, compare_in (the dtype of
    the logits).
    """
    with parallel(sizes) as ranks:
        tokens = options["tokens"]
        settings = QuantizationSettings(**options["settings"])
        model, plan = calibrated_student(ranks, folder, settings, tokens, options["dtype"])
        compare_in = options.get("compare_in", torch.float32)
        reference = student_reference(
            model, plan, lambda copied: gathered_logits(copied, ranks, tokens), dtype=compare_in
        )
        export_checkpoint(
            model, plan, options["output_dir"], model_dir=folder, layout=options.get("layout", "modelopt")
        )
        return reference


def verify_on_main(rank: int, world: int, folder: Path, tokens: np.ndarray, reference: Any) -> dict[str, str]:
    """The readers' results, on every rank; the first verifies."""

    def work(beat: Any) -> dict[str, str]:
        return dict(verify(folder, tokens=tokens, advance=lambda *progress: beat(), **vars(reference)).readers)

    return on_main_for_long(work, lambda: None)
