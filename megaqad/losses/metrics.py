"""How a student compares with its teacher, token by token: the numbers of an evaluation, no gradient.

The same chunks, FP32 logits and merges as the losses, so an evaluation needs no more memory than a training step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaqad.losses import gemm, inputs, kernels, kl
from megaqad.losses.inputs import Layout, Model, Tokens
from megaqad.losses.objectives.cross_entropy import label_logits
from megaqad.losses.sharding import Group, gather


@dataclass(frozen=True)
class TokenMetrics:
    """Per token, 0 and False where the token's weight is 0; the same on every rank."""

    kl: Tensor
    """KL(teacher || student) at temperature 1, FP32 [N]"""
    student_cross_entropy: Tensor
    """FP32 [N]"""
    teacher_cross_entropy: Tensor
    """FP32 [N]"""
    top1_agreement: Tensor
    """bool [N]: student and teacher prefer the same token; among equal logits the lowest id is preferred"""


def _top_candidate(logits: Tensor, vocab_start: int) -> Tensor:
    """This shard's largest logit and its global id, FP64 [2, n]; the lowest id among equals."""
    if logits.shape[1] == 0:
        return torch.tensor([[-torch.inf], [-1.0]], dtype=torch.float64, device=logits.device).expand(2, len(logits))
    values, columns = logits.max(-1)  # the first of equal maxima, says its contract
    return torch.stack([values.double(), (columns + vocab_start).double()])


def _top_token(gathered: Tensor) -> Tensor:
    """Candidates of all ranks [ranks, 2, n] -> the preferred global id [n]."""
    values, ids = gathered.unbind(1)
    return ids.where(values == values.amax(0), torch.inf).amin(0)


@torch.no_grad()
def compare_heads(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor,
    vocab_start: int = 0,
    group: Group = None,
    sequence_parallel: bool = False,
    impl: str = "auto",
) -> TokenMetrics:
    """KL, both cross entropies and top-1 agreement of every token whose weight is not 0.

    Sharding, dtypes and errors as in `linear_divergence`. Collectives: one small all-gather, two per chunk, and those
    of the hidden states under sequence parallelism.
    """
    student, teacher = Model(student_hidden, student_head), Model(teacher_hidden, teacher_head)
    tokens, layout = Tokens(token_weights, labels, vocab_start), Layout(group, sequence_parallel)
    kernel = kernels.choose(impl, student_head.device, {torch.float32})
    work = inputs.agree_on_work(student, teacher, tokens, layout, hidden_gradient=False)
    student, teacher = inputs.whole_sequence(student, layout), inputs.whole_sequence(teacher, layout)
    columns, count = student_head.shape[0], token_weights.shape[0]
    longest = max((chunk.shape[0] for chunk in work.chunks), default=0)
    buffers = gemm.logit_buffers(2, longest, student.head)
    losses = torch.zeros(3, count, dtype=torch.float32, device=student_hidden.device)
    agreement = torch.zeros(count, dtype=torch.bool, device=student_hidden.device)
    for chosen in work.chunks:
        logits_s = gemm.logits_(buffers[0, : len(chosen)], student.hidden[chosen], student.head)
        logits_t = gemm.logits_(buffers[1, : len(chosen)], teacher.hidden[chosen], teacher.head)
        places = inputs.local_labels(labels[chosen], vocab_start, columns)
        statistics = [
            kernel.statistics(logits_s, logits_t, temperature=1.0),
            label_logits(logits_s, places).unsqueeze(0),
            label_logits(logits_t, places).unsqueeze(0),
        ]
        gathered = kl.gathered_statistics(torch.cat(statistics), group)
        sums = kernel.merge(gathered[:, :5], temperature=1.0)
        losses[0, chosen] = sums.token_kl.float()
        # -log p(label) = log S + (peak - label's logit), for both models at once
        label = gathered[:, 5:].double().amax(0)
        losses[1:, chosen] = (sums.sums.log() + (sums.peaks.double() - label)).float()
        # ids stay FP64: FP32 cannot hold every id beyond 2^24
        tops = torch.cat([_top_candidate(logits_s, vocab_start), _top_candidate(logits_t, vocab_start)])
        best = gather(tops, group)
        agreement[chosen] = _top_token(best[:, :2]) == _top_token(best[:, 2:])
    return TokenMetrics(losses[0], losses[1], losses[2], agreement)
