"""Token ids in, FP32 logits out, in any layout; the tool for comparing with other programs."""

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.distillation.forward import forward_hidden
from megaqad.models.model import Model
from megaqad.recovery.session import Session


@torch.no_grad()
def gathered_logits(session: Session, model: Model, tokens: Tensor) -> Tensor | None:
    """FP32 logits [b, s, V] on the main rank, None elsewhere. One sequence at a time, so memory stays small.

    Collectives: the forward pass, a gather over the tensor-parallel group of the last stage, one send to the main rank.
    """
    ranks = session.ranks
    parts = []
    for row in tokens.to(ranks.device).split(1):
        hidden = forward_hidden(model, [row])
        if not ranks.is_last_stage:
            continue
        states = hidden[0]
        if ranks.sizes.sequence:
            states = _gather(states, ranks.tensor_group, dim=0)
        head = model.last.head_weight()
        local = states.squeeze(1).float() @ head.float().t()  # [s, V/tp]
        parts.append(_gather(local, ranks.tensor_group, dim=1).cpu())
    values = torch.stack(parts) if parts else None
    source = ranks.last_stage_rank
    if source == 0:
        return values if ranks.is_main else None
    if ranks.rank == source and ranks.data_rank == 0 and ranks.tensor_rank == 0:
        assert values is not None
        dist.send(values.to(ranks.device), dst=0)
    if ranks.is_main:
        received = torch.empty(*tokens.shape, session.architecture.vocab_size, device=ranks.device)
        dist.recv(received, src=source)
        return received.cpu()
    return None


def _gather(local: Tensor, group: dist.ProcessGroup, *, dim: int) -> Tensor:
    """Concatenate the ranks' tensors, which may differ in size along ``dim``."""
    if group.size() == 1:
        return local
    sizes: list[int] = [0] * group.size()
    dist.all_gather_object(sizes, local.shape[dim], group=group)
    # Collectives want equal shapes: pad to the largest part, gather, cut.
    padded = local.new_zeros(*local.shape[:dim], max(sizes), *local.shape[dim + 1 :])
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)
