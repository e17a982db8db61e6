"""The student whose logits an export is compared with: a copy of it, in FP32 where there is room for one.

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

from megaqad.models.model import Model
from megaqad.quantization.model import cache_amaxes, copy_quantized, input_amaxes
from megaqad.quantization.plan import QuantizationPlan


@dataclass(frozen=True)
class StudentReference:
    """What the student computes in FP32; the arguments of ``verify`` by their names."""

    reference_logits: np.ndarray | None
    """float32 [b, s, V], as the recipe computes; None when nobody asked for them."""
    weight_only_logits: np.ndarray | None
    """The same with activations and KV cache left alone; None when the recipe leaves them alone anyway."""
    dtype: torch.dtype
    """In which they were computed."""
    input_amax: Mapping[str, float]
    """Calibrated largest input by module name, of all stages."""
    cache_amax: Mapping[str, float]
    """Calibrated largest key and value by the name of the module that makes them, of all stages."""


def student_reference(
    student: Model,
    plan: QuantizationPlan,
    logits_of: Callable[[Model], Tensor | None] | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> StudentReference | None:
    """What ``verify`` compares an export of ``student`` with; on the main rank, None on the others.

    Args:
        student: quantized by ``plan``, in any dtype.
        logits_of: runs a model on the tokens to compare; FP32 logits [b, s, V] on the main rank. None: only the scales
            are compared.
        dtype: of the copies that are run.

    Memory: one copy of the weights at a time. Collectives: those of ``build_model``, ``refresh`` and ``logits_of``, and
    one object gather over all ranks.
    """
    logits: list[np.ndarray | None] = []
    for one in (plan, None if plan.is_smooth else plan.weights_alone()):
        found = None if logits_of is None or one is None else logits_of(copy_quantized(student, one, dtype=dtype))
        logits.append(None if found is None else found.numpy())
    amaxes: list[tuple[dict[str, float], dict[str, float]]] = [({}, {})] * student.ranks.world_size
    if not plan.is_smooth:
        dist.all_gather_object(amaxes, (input_amaxes(student), cache_amaxes(student)))
    if not student.ranks.is_main:
        return None
    return StudentReference(
        reference_logits=logits[0],
        weight_only_logits=logits[1],
        dtype=dtype,
        input_amax={name: amax for inputs, _ in amaxes for name, amax in inputs.items()},
        cache_amax={name: amax for _, caches in amaxes for name, amax in caches.items()},
    )
