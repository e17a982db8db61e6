"""What the ranks do in the tests of experts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.config import TrainSettings
from megaqad.data.batch import Batch
from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.step import DistillationStep, Objective
from megaqad.distillation.teachers import LiveTeacher
from megaqad.export.checkpoint import export_checkpoint
from megaqad.export.manifest import MANIFEST_FILE
from megaqad.models.build import build_model
from megaqad.models.families import describe_model
from megaqad.models.load import load_weights
from megaqad.models.model import Model
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.model import build_quantized
from megaqad.quantization.plan import plan_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.runtime.ranks import ParallelSizes, parallel
from megaqad.training.optimizer import build_optimizer, wrap_for_training


def logits(rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray) -> Tensor | None:
    """FP32 logits [b, s, V] of every replica's own tokens, gathered by tensor-parallel rank; on the last stage."""
    with parallel(sizes) as ranks:
        model = build_model(describe_model(folder), ranks, dtype=torch.float32)
        load_weights(model, folder)
        mine = torch.from_numpy(tokens).chunk(ranks.data_size)[ranks.data_rank]
        hidden = forward_hidden(model, list(mine.split(1)))
        if not hidden:
            return None
        states = torch.cat(hidden, 1)
        if sizes.sequence:
            parts = [torch.empty_like(states) for _ in range(sizes.tensor)]
            dist.all_gather(parts, states, group=ranks.tensor_group)
            states = torch.cat(parts)
        return (states.transpose(0, 1) @ model.last.head_weight().t()).detach()


def gradients(
    rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray, recipe: dict[str, Any] | None
) -> dict[str, Tensor]:
    """This rank's gradients by checkpoint tensor and place, and the loss and norm of a step on the same tokens."""
    with parallel(sizes) as ranks:
        teacher = build_model(describe_model(folder), ranks, dtype=torch.float32)
        load_weights(teacher, folder)
        teaches = recipe is not None
        model = _student(folder, ranks, recipe) if recipe is not None else teacher
        wrapped = wrap_for_training(model)
        optimizer, scheduler = build_optimizer(wrapped, TrainSettings(lr=1e-3, steps=2), torch.float32)
        step = DistillationStep(
            model,
            wrapped,
            optimizer,
            scheduler,
            objective=Objective.QAD if teaches else Objective.QAT,
            teacher=LiveTeacher(teacher.freeze()) if teaches else None,
        )
        mine = torch.from_numpy(tokens).chunk(ranks.data_size)[ranks.data_rank]
        batches = [Batch(row, row.roll(-1, 1), torch.ones(row.shape)) for row in mine.split(1)]
        step._weight_sum, _ = step._count(batches)
        step._forward_backward(step._with_teacher(batches), force_all_reduce=True)
        found = {}
        for held in model.held:
            gradient = held.slice_of(held.parameter.main_grad)
            for part, shard in zip(held.weight.parts, held.weight.take(gradient, *held.ranks), strict=True):
                found[f"{part.name}@{[start for start, _ in part.box(*held.ranks)]}"] = shard.clone()
        result = step(batches)
        return found | {"loss": torch.tensor(result.loss), "norm": torch.tensor(result.grad_norm)}


def _student(folder: Path, ranks: Any, recipe: dict[str, Any]) -> Model:
    architecture = describe_model(folder)
    plan = plan_for(QuantizationSettings(**recipe), architecture, ranks.sizes.tensor)
    model = build_quantized(architecture, ranks, plan, dtype=torch.float32)
    load_weights(model, folder)
    tokens = torch.randint(0, architecture.vocab_size, (4, 32), generator=torch.Generator().manual_seed(3))
    mine = list(tokens.chunk(ranks.data_size)[ranks.data_rank].split(1))
    silent = calibrate(model, lambda: forward_hidden(model, mine))
    assert all(".experts." in name for name in silent)
    return model


def exported(
    rank: int, world: int, folder: Path, sizes: ParallelSizes, recipe: dict[str, Any], target: Path
) -> str | None:
    """Calibrate and export; the manifest on the main rank."""
    with parallel(sizes) as ranks:
        model = _student(folder, ranks, recipe)
        plan = plan_for(QuantizationSettings(**recipe), model.architecture, sizes.tensor)
        export_checkpoint(model, plan, target, model_dir=folder)
        return (target / MANIFEST_FILE).read_text() if ranks.is_main else None
