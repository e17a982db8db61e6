"""Exact KL(teacher || student) of given logits whose vocabulary is sharded.

With p_t = softmax(b), p_s = softmax(a) over the whole vocabulary, a = z_student / T and b = z_teacher / T:

    KL_i = sum_v p_t (log p_t - log p_s)          dKL_i / dz_student = (p_s - p_t) / T

Each rank reduces its shard to five numbers per token (blocks.py); one all-gather of those 20 bytes per token gives
every rank the full KL and all it needs for its own shard's gradient:

    M = max_r m_r,   S = sum_r S_r e^((m_r - M) / T)          for student and teacher
    C = sum_r e^((m_t,r - M_t) / T) [C_r + S_t,r ((m_t,r - M_t) - (m_s,r - M_s)) / T]
    KL = C / S_t - log S_t + log S_s

There is no factor T^2: multiply the loss by T * T if gradients are to keep their size across temperatures.
Method: the closed form is textbook; merging running maxima and sums follows Milakov and Gimelshein (arXiv 1805.02867).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megaqad.losses import kernels, reference
from megaqad.losses.sharding import Group, gather

_MERGED_AT_ONCE = 4096
"""Tokens; the plain merge works in FP64, whose temporaries would otherwise be the largest memory of a call."""


def factors(sums: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """FP32 [2, n] for `Kernel.gradient`: scale / (T S); exactly 0 where `scale` [n] is 0, even if S is NaN."""
    return torch.where(scale == 0, 0.0, scale / (sums * temperature)).float()


def gathered_statistics(local: Tensor, group: Group) -> Tensor:
    """One all-gather of FP32: local [K, n] -> [ranks, K, n]. Unsharded statistics stay in FP64."""
    if group is None:
        return local.unsqueeze(0)
    local = local.float()
    return gather(local, group)


@dataclass(frozen=True)
class _Call:
    temperature: float
    group: Group
    kernel: kernels.Kernel
    inplace: bool


class _AllGatherStatisticsThenLocalGradient(torch.autograd.Function):
    """Forward: one all-gather. Backward: nothing but the local shard."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, call: _Call) -> Tensor:
        # not named here, so that the FP64 statistics are freed before the gather
        gathered = gathered_statistics(
            call.kernel.statistics(student, teacher, temperature=call.temperature, mask=mask), call.group
        )
        token_kl = student.new_empty(len(student), dtype=torch.float32)
        peaks, sums = student.new_empty(2, 2, len(student), dtype=torch.float32)
        for first in range(0, len(student), _MERGED_AT_ONCE):
            rows = slice(first, first + _MERGED_AT_ONCE)
            merged = call.kernel.merge(gathered[:, :, rows], temperature=call.temperature)
            token_kl[rows], peaks[:, rows], sums[:, rows] = merged.token_kl, merged.peaks, merged.sums
        if mask is not None:
            token_kl.masked_fill_(~mask, 0.0)
        ctx.save_for_backward(student, teacher, mask, peaks, sums)
        ctx.call = call
        return token_kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token_kl: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, mask, peaks, sums = ctx.saved_tensors
        scale = grad_token_kl if mask is None else grad_token_kl.masked_fill(~mask, 0.0)
        call: _Call = ctx.call
        scaled = factors(sums, scale, call.temperature)
        out = student.detach() if call.inplace else torch.empty_like(student)
        call.kernel.gradient(student, teacher, peaks=peaks, factors=scaled, temperature=call.temperature, out=out)
        return out, None, None, None


def vocab_parallel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    token_mask: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """KL(teacher || student) of every token over a vocabulary sharded on `group`.

    Sharding in: `student_logits`, `teacher_logits` [N, V_local] (BF16, FP16 or FP32), this rank's contiguous columns,
    the same columns in both; shards may differ in size between ranks and may be empty. `group=None`: not sharded.
    Sharding out: FP32 [N], the full KL, the same on every rank; differentiable in `student_logits` alone.
    Collectives: one all-gather of 20 bytes per token in forward, none in backward. The gradient of a rank's shard is
    complete, so the loss must not be summed over the group before backward.

    `token_mask` bool [N]: tokens marked False give 0 and a zero gradient whatever their logits, NaN included. Without
    it, a token whose incoming gradient is 0 still gets a gradient of exactly 0. -inf logits have probability 0.
    `inplace=True` writes the gradient over `student_logits` during backward and raises its autograd version, so that
    a producer that had saved its output fails loudly; the memory needed beyond the inputs is then 60 bytes per token;
    with a group of R ranks 20 (R + 1), and 20 R that gloo copies. Raises ValueError for tensors that do not fit.
    """
    _check(student_logits, teacher_logits, temperature, token_mask)
    kernel = kernels.choose(impl, student_logits.device, {student_logits.dtype, teacher_logits.dtype})
    if impl == "reference":
        return reference.vocab_parallel_kl(
            student_logits,
            teacher_logits,
            temperature=temperature,
            group=group,
            token_mask=token_mask,
            inplace=inplace,
        )
    token_kl = _AllGatherStatisticsThenLocalGradient.apply(
        student_logits, teacher_logits.detach(), token_mask, _Call(temperature, group, kernel, inplace)
    )
    assert isinstance(token_kl, Tensor)
    return token_kl


def _check(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} must be the same "
            "[tokens, vocabulary]; flatten leading dimensions, and give both models the same padded vocabulary"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floating point, not {student.dtype} and {teacher.dtype}")
    check_temperature(temperature)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student.shape[:1]):
        raise ValueError(f"token_mask is {mask.dtype} {tuple(mask.shape)}; it must be bool [{student.shape[0]}]")


def check_temperature(temperature: float) -> None:
    """ValueError unless 0 < temperature < inf."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
