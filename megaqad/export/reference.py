"""The student whose logits an export is compared with: its FP32 copy.

A BF16 student rounds every activation, and in W4A4 a last-bit difference flips codes (``verify.py`` has the numbers).
Only FP32 can tell a right file from a nearly right one, so the comparison is made with a copy that computes in FP32:
the same weights, the same scales, the same quantizers, in the same layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.build import copy_model
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.state import cache_amaxes, input_amaxes, modules_for, refresh_weights, set_mode
from megaqad.runtime.parallel import ParallelContext


@dataclass(frozen=True)
class StudentReference:
    """What the student computes in FP32; the arguments of ``verify`` by their names."""

    reference_logits: np.ndarray
    """float32 [b, s, V], as the recipe computes."""
    weight_only_logits: np.ndarray | None
    """float32 [b, s, V] with activations and KV cache left alone; None when the recipe leaves them alone anyway."""
    input_amax: Mapping[str, float]
    """Calibrated largest input by module name, of all stages."""
    cache_amax: Mapping[str, float]
    """Calibrated largest key and value by the name of the module that makes them, of all stages."""


def student_reference(
    student: list[CausalLM],
    description: ModelDescription,
    context: ParallelContext,
    recipe: Recipe,
    logits_of: Callable[[list[CausalLM]], Tensor | None],
) -> StudentReference | None:
    """What ``verify`` compares an export of ``student`` with; on the main rank, None on the others.

    Args:
        student: this rank's chunks, quantized by ``recipe``, in any dtype.
        logits_of: runs a model on the tokens to compare; FP32 logits [b, s, V] on the main rank.

    Memory: one FP32 copy of the weights at a time. Collectives: those of ``build_model``, ``refresh_weights`` and
    ``logits_of``, and one object gather over the pipeline.
    """
    logits = logits_of(float32_student(student, description, context, recipe))
    weight_only: Tensor | None = None
    amaxes: list[tuple[dict[str, float], dict[str, float]]] = [({}, {})] * context.sizes.pipeline
    if not recipe.is_smooth:
        weight_only = logits_of(float32_student(student, description, context, recipe.weights_alone()))
        dist.all_gather_object(amaxes, (input_amaxes(student), cache_amaxes(student)), group=context.pipeline_group)
    if logits is None:
        return None
    return StudentReference(
        reference_logits=logits.numpy(),
        weight_only_logits=None if weight_only is None else weight_only.numpy(),
        input_amax={name: amax for inputs, _ in amaxes for name, amax in inputs.items()},
        cache_amax={name: amax for _, caches in amaxes for name, amax in caches.items()},
    )


def float32_student(
    student: list[CausalLM], description: ModelDescription, context: ParallelContext, recipe: Recipe
) -> list[CausalLM]:
    """A copy of ``student`` that computes in FP32 and quantizes as ``recipe`` says; forward only.

    ``recipe`` must choose the same modules as the student's own; it may leave activations alone.
    """
    modules = modules_for(recipe, description, backend="emulated")
    copies = copy_model(student, description, context, dtype=torch.float32, **modules)
    refresh_weights(copies, context)
    set_mode(copies, QuantizerMode.ON)
    return copies
