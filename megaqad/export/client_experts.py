"""Mixtures of experts as their checkpoints name them, and as engines round them.

transformers keeps the experts of a layer in two parameters, ``experts.gate_up_proj`` [E, 2 I, H] and
``experts.down_proj`` [E, H, I]; checkpoints have a tensor for each expert and projection. ``slots`` gives every
tensor of a checkpoint its place in the model's parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GATE_UP, DOWN = "gate_up_proj", "down_proj"
NAMES: dict[str, tuple[str, tuple[str, str, str]]] = {"mixtral": ("block_sparse_moe", ("w1", "w3", "w2"))}
"""By ``model_type``: what checkpoints call transformers' ``mlp`` where it has experts, and their gate, up and down."""
USUAL = ("mlp", ("gate_proj", "up_proj", "down_proj"))


def slots(model: nn.Module, model_type: str) -> dict[str, Tensor]:
    """The part of the model's parameters that each tensor of a checkpoint fills, by the checkpoint's name."""
    block, names = NAMES.get(model_type, USUAL)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        renamed = name.replace(f".{USUAL[0]}.", f".{block}.") if block != USUAL[0] else name
        prefix, _, leaf = renamed.rpartition(".")
        if parameter.dim() != 3 or leaf not in (GATE_UP, DOWN):
            found[renamed] = parameter.data
            continue
        for expert, matrix in enumerate(parameter.data):
            parts = matrix.chunk(2) if leaf == GATE_UP else [matrix]
            of_leaf = names[:2] if leaf == GATE_UP else names[2:]
            for projection, part in zip(of_leaf, parts, strict=True):
                found[f"{prefix}.{expert}.{projection}.weight"] = part
    return found


def linear_modules(model: nn.Module, model_type: str) -> list[str]:
    """The linear modules of a checkpoint, in model order, those of experts one by one."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    every = (name.removesuffix(".weight") for name in slots(model, model_type) if name.endswith(".weight"))
    return [name for name in every if name in linears or ".experts." in name]


class RoundedExperts(nn.Module):
    """transformers' experts with the inputs of both products rounded; in place of the module that holds the weights."""

    def __init__(
        self, experts: Any, rounds: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]
    ) -> None:
        """``rounds``: for each expert what rounds the input of gate and up, and of down."""
        super().__init__()
        self.experts, self.rounds = experts, rounds

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """hidden [n, H], chosen int64 [n, k], shares [n, k] -> [n, H]."""
        output = torch.zeros_like(hidden)
        for expert, (of_input, of_inner) in enumerate(self.rounds):
            tokens, places = torch.where(chosen == expert)
            gate, up = (of_input(hidden[tokens]) @ self.experts.gate_up_proj[expert].t()).chunk(2, dim=-1)
            inner = of_inner(self.experts.act_fn(gate) * up)
            result = inner @ self.experts.down_proj[expert].t() * shares[tokens, places, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output
