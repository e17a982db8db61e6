"""Which layer groups to keep in BF16 so that the model meets an average bit width at the least KL.

A *group* is what a user decides about: the attention or the MLP of one layer (``model.layers.3.mlp``), or the head.
Quantized alone, with everything else in BF16, each costs a KL that can be measured. Small KLs add up well, so choosing
is a knapsack problem: among all choices whose average stays at or below the target, take the one whose quantized
groups' KLs sum to the least. It is solved exactly by dynamic programming over the bits that keeping groups would cost.

Runs in different layouts measure the same KL only up to rounding, and a choice must not hang on the last digits: KLs
are compared after rounding to two digits, and of equal choices the one that keeps earlier groups is taken. No torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, gcd

import numpy as np

NVFP4_BITS, BF16_BITS = 4.5, 16.0
_IN_LAYER = re.compile(r"(.*?\.\d+\.[^.]+)\..+")
_DIGITS = 2
_MOST_UNITS = 20_000
"""Steps into which the budget is divided where the group sizes have no large common divisor; sizes are rounded up then,
so the target still holds."""


@dataclass(frozen=True)
class Group:
    """Linear modules that are decided about together."""

    name: str
    modules: tuple[str, ...]
    weights: int
    """Elements of their weights."""


@dataclass(frozen=True)
class GroupKL:
    """What quantizing one group alone does to the model."""

    group: str
    kl_to_teacher: float
    """Held-out KL in nats per token with every other group in BF16."""
    weights: int


def groups_of(modules: Sequence[str], sizes: Mapping[str, int]) -> list[Group]:
    """The groups of ``modules`` (Hugging Face names), in model order. ``sizes``: elements of each module's weight."""
    members: dict[str, list[str]] = {}
    for module in modules:
        inside = _IN_LAYER.fullmatch(module)
        members.setdefault(inside[1] if inside else module, []).append(module)
    return [Group(name, tuple(held), sum(sizes[module] for module in held)) for name, held in members.items()]


def average_bits(groups: Sequence[GroupKL], kept: Sequence[str]) -> float:
    """Bits per weight over all groups, block scales included, with those named in ``kept`` in BF16."""
    bits = sum(group.weights * (BF16_BITS if group.group in kept else NVFP4_BITS) for group in groups)
    return bits / sum(group.weights for group in groups)


def choose_kept(groups: Sequence[GroupKL], target_bits: float) -> list[str]:
    """Names of the groups to keep in BF16, in model order, so that ``average_bits`` is at most ``target_bits``.

    Args:
        groups: measured, in model order.
        target_bits: at least ``NVFP4_BITS``, below ``BF16_BITS``.
    """
    assert NVFP4_BITS <= target_bits < BF16_BITS, f"{target_bits} bits are checked with the settings"
    total = sum(group.weights for group in groups)
    # Keeping a group costs its weights x 11.5 bits; the budget is what the target leaves above NVFP4 for all.
    budget = floor(total * (target_bits - NVFP4_BITS) / (BF16_BITS - NVFP4_BITS) + 1e-6)
    unit = max(gcd(*(group.weights for group in groups)), -(-total // _MOST_UNITS))
    costs = [-(-group.weights // unit) for group in groups]
    room = budget // unit

    # best[u]: the largest KL that keeping some of the groups seen so far saves in u units. Going from the last group to
    # the first makes earlier groups win ties.
    best = np.zeros(room + 1)
    taken = np.zeros((len(groups), room + 1), dtype=bool)
    for index in reversed(range(len(groups))):
        saved, cost = _rounded(groups[index].kl_to_teacher), costs[index]
        if cost > room or saved <= 0:
            continue
        with_it = best[: room + 1 - cost] + saved
        taken[index, cost:] = with_it >= best[cost:]
        best[cost:] = np.maximum(best[cost:], with_it)
    kept = []
    for index, group in enumerate(groups):
        if taken[index, room]:
            kept.append(group.group)
            room -= costs[index]
    return kept


def _rounded(kl: float) -> float:
    return float(f"{kl:.{_DIGITS - 1}e}")
