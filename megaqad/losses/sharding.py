"""The collectives of a loss whose vocabulary is sharded, and nothing else.

Every rank of `group` holds a contiguous range of vocabulary columns; the ranges may differ in size and may be empty.
`group=None` means that the vocabulary is not sharded at all, whatever default process group exists, so the
mathematics above this file never asks where it runs. All ranks of a group must call these functions in the same
order; callers therefore decide how often to call them from numbers that `agree` has made equal on all ranks.
"""

import torch
from torch import Tensor
from torch import distributed as dist

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # the names before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Number of vocabulary shards."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """Which vocabulary shard this rank holds."""
    return 0 if group is None else dist.get_rank(group)


def gather(local: Tensor, group: Group) -> Tensor:
    """One all-gather: local [...] -> [ranks, ...], the same on every rank."""
    if group is None:
        return local.unsqueeze(0)
    gathered = local.new_empty((group_size(group), *local.shape))
    all_gather_single(gathered.view(-1), local.contiguous().view(-1), group=group)
    return gathered


def sum_over_shards_(partial: Tensor, group: Group) -> Tensor:
    """One all-reduce in place: partial [...] -> the sum over all ranks."""
    if group is not None:
        dist.all_reduce(partial, group=group)
    return partial


def gather_sequence(local: Tensor, group: Group) -> Tensor:
    """One all-gather along tokens: [N / ranks, H] -> [N, H], rank 0's tokens first (sequence parallelism)."""
    return gather(local, group).flatten(0, 1)


def scatter_sequence_sum(partial: Tensor, group: Group) -> Tensor:
    """One reduce-scatter along tokens: [N, H] partial sums -> [N / ranks, H], this rank's slice of the sum."""
    if group is None:
        return partial
    summed = partial.new_empty((partial.shape[0] // group_size(group), *partial.shape[1:]))
    reduce_scatter_single(summed, partial.contiguous(), group=group)
    return summed


def agree(values: dict[str, int], group: Group, device: torch.device) -> dict[str, list[int]]:
    """One small all-gather of integers: name -> the value on every rank, rank 0 first."""
    gathered = gather(torch.tensor(list(values.values()), dtype=torch.int64, device=device), group)
    return dict(zip(values, gathered.t().tolist(), strict=True))
