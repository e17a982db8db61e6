"""Key/value heads that several tensor-parallel ranks share, because the model has fewer heads than there are ranks.

Every one of these ranks computes with a copy. The first is the one whose copy counts: it gets the sum of the copies'
gradients, the others none, so that the gradient's norm counts each weight once; after the update the others take its
values. Only such models pay for it: two all-reduces of their key/value weights per step over the tensor-parallel ranks.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.models.model import Held, Model
from megaqad.models.weights import HfTensor
from megaqad.runtime.ranks import Ranks


def _shared(model: Model) -> Iterator[tuple[Held, int, HfTensor]]:
    """Weights on this rank with the number of a part that ranks share."""
    tensor = model.ranks.sizes.tensor
    for held in model.held:
        for index, part in enumerate(held.weight.parts):
            if part.cut.units is not None and part.cut.units < tensor:
                yield held, index, part


def _sum_by_head(values: Tensor, part: HfTensor, ranks: Ranks) -> Tensor:
    """The sum of ``values`` over the ranks that share this rank's heads. Collective: one all-reduce."""
    assert part.cut.units is not None
    mine = ranks.tensor_rank * part.cut.units // ranks.sizes.tensor
    slots = values.new_zeros(part.cut.units, *values.shape)
    slots[mine] = values
    dist.all_reduce(slots, group=ranks.tensor_group)
    return slots[mine]


@torch.no_grad()
def sum_shared_gradients(model: Model) -> None:
    """Between the last backward pass and the update, on the accumulated gradients."""
    ranks = model.ranks
    for held, index, part in _shared(model):
        if held.parameter.requires_grad:
            gradient = held.weight.join.views(vars(held.parameter)["main_grad"], ranks.sizes.tensor)[index]
            total = _sum_by_head(gradient, part, ranks)
            gradient.copy_(total if part.cut.is_first(ranks.tensor_rank, ranks.sizes.tensor) else 0 * total)


@torch.no_grad()
def spread_shared_weights(model: Model) -> None:
    """After the update: every copy becomes the first one."""
    ranks = model.ranks
    for held, index, part in _shared(model):
        if held.parameter.requires_grad:
            view = held.weight.join.views(held.data, ranks.sizes.tensor)[index]
            first = part.cut.is_first(ranks.tensor_rank, ranks.sizes.tensor)
            view.copy_(_sum_by_head(view if first else torch.zeros_like(view), part, ranks))
