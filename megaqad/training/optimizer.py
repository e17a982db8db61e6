"""Megatron-Core's DDP, distributed Adam and learning-rate schedule, from our settings.

Parameters are in the run's dtype; with BF16 the optimizer keeps FP32 main parameters and moments, sharded over the
data-parallel ranks. Gradients are accumulated and reduced in FP32.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
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
from megaqad.models.causal_lm import CausalLM
from megaqad.models.modules import QuantizerParameter
from megaqad.quantization.settings import SCALE_LR


def wrap_for_training(chunks: Sequence[CausalLM]) -> list[DistributedDataParallel]:
    """The chunks in Megatron-Core's DDP, gradients in one FP32 buffer. Parameters move into a contiguous buffer too.

    The copies of the parameters on data-parallel ranks must be equal already; no collective is issued here.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.train()
    return wrapped


def build_optimizer(
    student: Sequence[DistributedDataParallel],
    settings: TrainSettings,
    dtype: torch.dtype,
    *,
    scale_lr: float = SCALE_LR,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Distributed Adam with decoupled weight decay and global-norm clipping; linear warm-up, then cosine to min_lr.

    Also tells the model's config how the schedules finish a step (``finalize_model_grads``: reduction over data,
    embedding and sequence-parallel ranks, division by the tokens of the global batch).

    Args:
        scale_lr: peak learning rate of learned scales, which take part in the same warm-up and cosine, down to 0, and
            have no weight decay.
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
        config, list(student), config_overrides={**get_standard_config_overrides(config), is_scale: of_scales}
    )
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
        chunk.module.config.finalize_model_grads_func = finalize_model_grads
        chunk.module.config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler
