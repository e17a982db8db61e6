"""Megatron-Core's DDP, distributed Adam and learning-rate schedule, from our settings.

Parameters are in the run's dtype; with BF16 the optimizer keeps FP32 main parameters and moments, sharded over the
data-parallel ranks. Gradients are accumulated and reduced in FP32.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaqad.config import TrainSettings
from megaqad.models.model import Model, QuantizerParameter
from megaqad.quantization.settings import SCALE_LR
from megaqad.training.pieces import distributed_optimizers


def wrap_for_training(model: Model, *, overlap: bool | None = None) -> list[DistributedDataParallel]:
    """The model's chunks in Megatron-Core's DDP, gradients in one FP32 buffer. Parameters move into one buffer too.

    Args:
        overlap: reduce a layer's gradients, in FP32, while those of the layers before it are computed; None: on CUDA,
            where there are data-parallel ranks. Parameters are gathered before the next forward all the same, because
            that is when their quantized copies are made.

    The copies of the parameters on data-parallel ranks must be equal already. Collectives: those of ``Model.changed``.
    """
    if overlap is None:
        overlap = model.ranks.data_size > 1 and model.ranks.device.type == "cuda"
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config, ddp_config, chunk, disable_bucketing=index > 0, pg_collection=model.ranks.groups
        )
        for index, chunk in enumerate(model.chunks)
    ]
    if overlap:  # only what the last microbatch adds makes a gradient complete
        inside = [chunk.no_sync for chunk in wrapped]
        model.chunks[0].config.no_sync_func = inside if len(inside) > 1 else inside[0]
    for chunk in wrapped:
        chunk.train()
    model.changed()  # training keeps the quantized copies of its weights
    return wrapped


def build_optimizer(
    student: Sequence[DistributedDataParallel],
    settings: TrainSettings,
    dtype: torch.dtype,
    *,
    scale_lr: float = SCALE_LR,
    fused: str = "auto",
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Distributed Adam with decoupled weight decay and global-norm clipping; linear warm-up, then cosine to min_lr.

    Args:
        scale_lr: peak learning rate of learned scales, which take part in the same warm-up and cosine, down to 0, and
            have no weight decay.
        fused: ``runtime.fused``; ``auto`` updates all parameters by one kernel on CUDA.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=1e-8,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    of_scales: ParamGroupOverride = {"wd_mult": 0.0, "max_lr": scale_lr, "min_lr": 0.0}
    is_scale = ParamKey(predicate=ParamPredicate("scale", lambda one: isinstance(one, QuantizerParameter)))
    optimizer = get_megatron_optimizer(
        config,
        list(student),
        config_overrides={**get_standard_config_overrides(config), is_scale: of_scales},
        use_gloo_process_groups=False,
        pg_collection=student[0].module.pg_collection,
    )
    if fused == "auto" and next(student[0].parameters()).is_cuda:
        update_by_one_kernel(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=settings.steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=settings.steps,
        wd_incr_style="constant",
    )
    for chunk in student:
        chunk.module.config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler


def update_by_one_kernel(optimizer: MegatronOptimizer) -> None:
    """Have PyTorch's Adam go over memory once; Transformer Engine's and Apex's, where installed, do anyway."""
    for inner in distributed_optimizers(optimizer):
        if isinstance(inner.optimizer, torch.optim.Adam):  # AdamW is one
            for group in inner.optimizer.param_groups:
                group.update(fused=True, foreach=False)
