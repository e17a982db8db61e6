"""A mixture of experts: a router chooses a few experts for every token; some models add one that all tokens take.

    x [n, h] -> router -> for each token its experts and their shares
      -> rows sorted by expert -> to the ranks that hold the experts (all-to-all over the expert-parallel ranks)
      -> gate/up, activation, down, each a grouped product over this rank's experts
      -> back the same way -> summed by share

Expert parallelism divides the experts among neighbouring data-parallel ranks, which exchange tokens; tensor parallelism
divides each expert's matrices as it does an MLP's. Under it every rank routes all tokens of its sequence, so that what
is exchanged needs no second exchange; the partial sums of the ranks are added once, after the experts' outputs have
been summed by token, which is ``top_k`` times less than before. Gradients of input and router are then partial sums
too, and the operations at the entry add them.

The student routes for itself. There is no balancing loss: distillation keeps the routing that the teacher has.

Letters: n tokens of this rank's sequences, k experts of a token, e experts on this rank, t rows that came to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaqad.models.blocks.block import Builder, product_flops
from megaqad.models.blocks.mlp import Mlp
from megaqad.models.blocks.rotary import Tables
from megaqad.models.weights import COLUMN, ROW, GateUp, HfTensor, Weight
from megaqad.runtime.sizes import ParallelSizes


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer."""

    module: str
    """Its Hugging Face name; experts are ``<module>.experts.N``."""
    hidden: int
    ffn: int
    """Of one expert."""
    count: int
    top_k: int
    normalize: bool
    """Whether a token's shares add up to 1."""
    activation: str = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    shared: Mlp | None = None
    """An expert that every token takes."""
    shared_gate: str | None = None
    """Name of the projection whose sigmoid scales that expert's output."""

    def _matrix(self, name: str, *shape: int) -> HfTensor:
        return HfTensor(f"{self.module}.{name}.weight", shape)

    @property
    def routes(self) -> Weight:
        return Weight("router", (self._matrix(self.router, self.count, self.hidden),))

    def fc1(self, expert: int) -> Weight:
        names = (f"experts.{expert}.{self.gate}", f"experts.{expert}.{self.up}")
        parts = tuple(replace(self._matrix(name, self.ffn, self.hidden), cut=COLUMN) for name in names)
        return Weight("linear_fc1.weight", parts, GateUp(), linear=True, expert=expert, experts=self.count)

    def fc2(self, expert: int) -> Weight:
        part = replace(self._matrix(f"experts.{expert}.{self.down}", self.hidden, self.ffn), cut=ROW)
        return Weight("linear_fc2.weight", (part,), linear=True, expert=expert, experts=self.count)

    def weights(self) -> Sequence[Weight]:
        weights = [self.routes]
        for expert in range(self.count):
            weights += [self.fc1(expert), self.fc2(expert)]
        if self.shared is not None:
            weights += [replace(weight, name=f"shared.{weight.name}") for weight in self.shared.weights()]
        if self.shared_gate is not None:
            weights.append(Weight("shared_gate", (self._matrix(self.shared_gate, 1, self.hidden),)))
        return weights

    def build(self, builder: Builder) -> nn.Module:
        return MixtureOfExperts(self, builder)

    def refuse(self, sizes: ParallelSizes) -> str | None:
        if self.count % sizes.expert:
            fitting = [str(size) for size in range(1, self.count + 1) if self.count % size == 0]
            return (
                f"parallel.expert={sizes.expert} does not divide the {self.count} experts of {self.module}; choose one "
                f"of {', '.join(fitting)}"
            )
        if self.ffn % sizes.tensor:
            return (
                f"parallel.tensor={sizes.tensor} does not divide the experts' size {self.ffn} of {self.module}; choose "
                "a divisor"
            )
        return None if self.shared is None else self.shared.refuse(sizes)

    def flops(self, tokens: int) -> float:
        used = self.top_k * product_flops([self.fc1(0), self.fc2(0)])
        shared = 0.0 if self.shared is None else self.shared.flops(tokens)
        return product_flops([self.routes]) + used + shared


class MixtureOfExperts(nn.Module):
    """[s(/tp), b, h] -> [s(/tp), b, h].

    Collectives: over the tensor-parallel ranks those of a column- and a row-parallel layer; over the expert-parallel
    ranks three all-to-all in forward, one of them of counts, and two in backward.
    """

    def __init__(self, block: Experts, builder: Builder) -> None:
        super().__init__()
        self.block, self.ranks, self.operations = block, builder.ranks, builder.operations
        self.sequence_parallel: bool = builder.config.sequence_parallel
        self.router = _matrix(block.routes, builder)
        self.balance = 0.0
        """Weight of the balancing loss, per token."""
        mine = builder.ranks.local_experts(block.count)
        self.linear_fc1 = builder.grouped_linear([block.fc1(expert) for expert in mine])
        self.linear_fc2 = builder.grouped_linear([block.fc2(expert) for expert in mine])
        self.shared = None if block.shared is None else block.shared.build(builder.within("shared"))
        self.shared_gate = None
        if block.shared_gate is not None:
            weights = [weight for weight in block.weights() if weight.name == "shared_gate"]
            self.shared_gate = _matrix(weights[0], builder)
            self.shared_gate.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, tables: Tables) -> Tensor:
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        group = self.ranks.tensor_group
        if self.sequence_parallel:
            tokens = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            tokens = copy_to_tensor_model_parallel_region(hidden, group=group)
        routed = self._routed(tokens.flatten(0, 1)).view_as(tokens)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(routed, group=group)
        else:
            output = reduce_from_tensor_model_parallel_region(routed, group=group)
        if self.shared is not None:
            shared = self.shared(hidden, tables)
            if self.shared_gate is not None:
                shared = torch.sigmoid(nn.functional.linear(hidden, self.shared_gate)) * shared
            output = output + shared
        whole: Tensor = output
        return whole

    def _routed(self, tokens: Tensor) -> Tensor:
        """[n, h] -> [n, h], this tensor-parallel rank's part of the sum over experts."""
        shares, chosen = self.route(tokens)  # [n, k]
        order = chosen.flatten().argsort(stable=True)
        rows = tokens[order // self.block.top_k]  # [n k, h], by expert
        counts = torch.bincount(chosen.flatten(), minlength=self.block.count)
        exchange = _Exchange.of(counts, self.ranks.expert_group)
        arrived = exchange.there(rows)
        inner = self.linear_fc1(arrived, exchange.of_expert)
        inner = self.operations.gated(inner, self.block.activation)
        back = exchange.back(self.linear_fc2(inner, exchange.of_expert))
        by_token = torch.empty_like(order)
        by_token[order] = torch.arange(len(order), device=order.device)
        outputs = back[by_token].view(*chosen.shape, -1)  # [n, k, h]
        return (outputs * shares.unsqueeze(-1)).sum(1).to(tokens.dtype)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Shares in the dtype of ``tokens``, and experts, of each token: [n, k] both."""
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        router = self.router
        if router.requires_grad:  # what comes back to it is a partial sum on each tensor-parallel rank
            router = copy_to_tensor_model_parallel_region(router, group=self.ranks.tensor_group)
        scores = nn.functional.linear(tokens, router).softmax(-1, dtype=torch.float32)
        shares, chosen = scores.topk(self.block.top_k, dim=-1)
        if self.balance and torch.is_grad_enabled():
            loss = balancing_loss(scores, chosen) * (self.balance * len(tokens) / self.ranks.sizes.tensor)
            shares = _AddLoss.apply(shares, loss)
        if self.block.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(tokens.dtype), chosen


def balancing_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """Experts times the sum over them of (share of choices x mean score): 1 when all are equally busy.

    Switch Transformers (arXiv 2101.03961), equation 4, over the tokens of one microbatch.

    Args:
        scores: [n, experts], of the router's softmax.
        chosen: int64 [n, k].
    """
    experts = scores.shape[-1]
    busy = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (busy * scores.mean(0)).sum()


class _AddLoss(torch.autograd.Function):
    """Forward: the first argument. Backward: its gradient, and 1 for the loss, which is so added to the sum over tokens
    that training minimises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=torch.float32, device=grads[0].device)


def _matrix(weight: Weight, builder: Builder) -> nn.Parameter:
    """A matrix that every rank has."""
    config = builder.config
    parameter = nn.Parameter(torch.empty(weight.parts[0].shape, dtype=config.params_dtype, device=builder.device))
    if config.perform_initialization:
        nn.init.normal_(parameter, std=config.init_method_std)
    return parameter


@dataclass(frozen=True)
class _Exchange:
    """The way of rows, sorted by expert, to the ranks that hold the experts, and back."""

    group: dist.ProcessGroup
    sent: list[int]
    """Rows to each rank of ``group``."""
    received: list[int]
    """Rows from each."""
    by_expert: Tensor | None
    """int64 [t]: the rows as they arrive, rank by rank, in the order of this rank's experts; None: they are."""
    of_expert: list[int]
    """How many rows each of this rank's experts gets."""

    @classmethod
    def of(cls, counts: Tensor, group: dist.ProcessGroup) -> "_Exchange":
        """``counts``: int64 [experts], this rank's rows for each expert of the layer."""
        ranks = group.size()
        if ranks == 1:
            return cls(group, [], [], None, counts.tolist())
        here = torch.empty_like(counts)  # [ranks, e]: what each rank sends to each of this rank's experts
        dist.all_to_all_single(here, counts, group=group)
        here, there = here.view(ranks, -1).cpu(), counts.view(ranks, -1).sum(1).tolist()
        ends = here.flatten().cumsum(0)
        starts = (ends - here.flatten()).view(ranks, -1)
        by_expert = [
            torch.arange(start, start + size)
            for start, size in zip(starts.t().flatten().tolist(), here.t().flatten().tolist(), strict=True)
        ]
        order = torch.cat(by_expert).to(counts.device)
        return cls(group, there, here.sum(1).tolist(), order, here.sum(0).tolist())

    def there(self, rows: Tensor) -> Tensor:
        """[n k, h] -> [t, h], by expert."""
        if self.by_expert is None:
            return rows
        from megatron.core.tensor_parallel import all_to_all

        arrived: Tensor = all_to_all(self.group, rows, self.received, self.sent)
        return arrived[self.by_expert]

    def back(self, rows: Tensor) -> Tensor:
        """[t, h] -> [n k, h], each to the place that it came from."""
        if self.by_expert is None:
            return rows
        from megatron.core.tensor_parallel import all_to_all

        as_arrived = torch.empty_like(self.by_expert)
        as_arrived[self.by_expert] = torch.arange(len(as_arrived), device=as_arrived.device)
        returned: Tensor = all_to_all(self.group, rows[as_arrived], self.sent, self.received)
        return returned
