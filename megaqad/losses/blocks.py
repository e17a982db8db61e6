"""Forward KL on one vocabulary shard in plain PyTorch: the portable kernel, and the shape of every other one.

A kernel is three functions. `statistics` reduces a token's local logits to five numbers; after the ranks have exchanged
them, `merge` makes five of all and `gradient` turns each logit into its derivative, with no further communication:

    a = z_student / T,  b = z_teacher / T,  m = local maximum (of the raw logits), d = (z - m) / T
    S = sum e^d   for student and teacher,      C = sum e^(d_t) (d_t - d_s)

No logit enters an exponential or a sum before its own maximum has been subtracted, and the log-sum-exp, which would be
of the logits' magnitude, is never formed: at logits of 1e4 one FP32 log-sum-exp alone is wrong by 1e-3.
Logits are clamped to -1e30 first, so that -inf (padding columns, a shard that is all padding) never meets another -inf;
NaN passes through everything on purpose.

Rows are taken a cache-sized block at a time into FP32 scratch, so nothing of the size of the logits is allocated. Sums
run over 4096 columns in FP32 and over those partial sums in FP64: one FP32 sum over a vocabulary of 152,000 costs ten
times the error. Sharding: every tensor here is this rank's shard; no collectives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1e30
"""What -inf becomes: far below any logit, far above the end of FP32's range."""
SUM_BLOCK = 4096
_BLOCK_ELEMENTS = 1 << 18


def row_blocks(tokens: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of rows, each about 2^18 logits and at least one row."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, tokens, rows):
        yield slice(first, min(first + rows, tokens))


def blocked_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension: FP32 [n, v] -> FP64 [n], FP32 within 4096 columns and FP64 across them."""
    whole = values.shape[-1] // SUM_BLOCK * SUM_BLOCK
    total = values[:, whole:].sum(-1).double()
    if whole:
        total += values[:, :whole].unflatten(-1, (-1, SUM_BLOCK)).sum(-1).double().sum(-1)
    return total


def peak(logits: Tensor) -> Tensor:
    """Local maximum [n, v] -> FP32 [n]; -1e30 for a shard without columns or without finite logits."""
    if logits.shape[-1] == 0:
        return torch.full(logits.shape[:1], FLOOR, dtype=torch.float32, device=logits.device)
    return logits.amax(-1).float().clamp_(min=FLOOR)


def shifted(logits: Tensor, peaks: Tensor, temperature: float, out: Tensor) -> Tensor:
    """(max(z, -1e30) - peak) / T in FP32: logits [n, v], peaks [n] -> out [n, v]."""
    out.copy_(logits).clamp_(min=FLOOR).sub_(peaks.unsqueeze(-1))
    return out if temperature == 1.0 else out.div_(temperature)


@dataclass(frozen=True)
class KLSums:
    """What a token's KL and its gradient need, the same on all ranks."""

    token_kl: Tensor
    """FP64 [n]"""
    peaks: Tensor
    """FP32 [2, n]: maximum logit of student and teacher"""
    sums: Tensor
    """FP64 [2, n]: sum of e^((z - peak) / T) of student and teacher"""


def merge(gathered: Tensor, *, temperature: float) -> KLSums:
    """Local statistics of all ranks [ranks, 5, n] -> the sums over the whole vocabulary; kl.py has the formulas."""
    peak_s, sum_s, peak_t, sum_t, cross = gathered.double().unbind(1)  # each [ranks, n]
    top_s, top_t = peak_s.amax(0), peak_t.amax(0)
    drop_s, drop_t = (peak_s - top_s) / temperature, (peak_t - top_t) / temperature
    total_s = (sum_s * drop_s.exp()).sum(0)
    total_t = (sum_t * drop_t.exp()).sum(0)
    total_cross = (drop_t.exp() * (cross + sum_t * (drop_t - drop_s))).sum(0)
    token_kl = total_cross / total_t - total_t.log() + total_s.log()
    return KLSums(token_kl, torch.stack([top_s, top_t]).float(), torch.stack([total_s, total_t]))


def statistics(student: Tensor, teacher: Tensor | None, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Local sums of forward KL: logits [n, v] BF16 or FP32 -> FP64 [5, n]: m_s, S_s, m_t, S_t, C.

    Without a teacher [2, n]: m_s, S_s, which is all that cross entropy needs. Rows where `mask` bool [n] is False may
    be left unread; their statistics are finite or not, and mean nothing.
    """
    tokens, columns = student.shape
    result = torch.zeros(2 if teacher is None else 5, tokens, dtype=torch.float64, device=student.device)
    for rows in row_blocks(tokens, columns):
        if mask is not None and not mask[rows].any():
            continue
        a, b, e = torch.empty(3, *student[rows].shape, dtype=torch.float32, device=student.device)
        result[0, rows] = peak_s = peak(student[rows])
        result[1, rows] = blocked_sum(torch.exp(shifted(student[rows], peak_s, temperature, out=a), out=e))
        if teacher is not None:
            result[2, rows] = peak_t = peak(teacher[rows])
            result[3, rows] = blocked_sum(torch.exp(shifted(teacher[rows], peak_t, temperature, out=b), out=e))
            result[4, rows] = blocked_sum(b.sub_(a).mul_(e))
    return result


def gradient(
    student: Tensor, teacher: Tensor | None, *, peaks: Tensor, factors: Tensor, temperature: float, out: Tensor
) -> Tensor:
    """out = f_s e^((z_s - m_s) / T) - f_t e^((z_t - m_t) / T), and 0 in rows where both factors are 0.

    `student`, `teacher`, `out` [n, v] (`out` may be `student`, or BF16 in the first halves of the rows of either),
    `peaks` FP32 [2, n] of the whole vocabulary (student, teacher), `factors` FP32 [2, n]; [1, n] each without a
    teacher, whose term is then left out. A row of zero factors is 0 even where its logits are NaN.
    """
    silent = (factors == 0).all(0)
    for rows in row_blocks(*student.shape):
        a, b = torch.empty(2, *student[rows].shape, dtype=torch.float32, device=student.device)
        shifted(student[rows], peaks[0, rows], temperature, out=a).exp_().mul_(factors[0, rows].unsqueeze(-1))
        if teacher is not None:
            shifted(teacher[rows], peaks[1, rows], temperature, out=b).exp_().mul_(factors[1, rows].unsqueeze(-1))
            a.sub_(b)
        out[rows] = a.masked_fill_(silent[rows].unsqueeze(-1), 0.0)
    return out
