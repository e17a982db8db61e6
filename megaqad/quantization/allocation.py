"""Which layer groups stay BF16 or become FP8 so that the model meets an average bit width at the least KL.

A *group* is what a user decides about: the attention or the MLP of one layer (``model.layers.3.mlp``), or the head; so
what engines fuse stays together. Quantized alone, with everything else in BF16, each costs a KL that can be measured,
in NVFP4 (4.5 bits) and in FP8 (8 bits); BF16 (16 bits) costs none. Small KLs add up well, so choosing is a knapsack
problem with one pick per group: among all choices whose average stays at or below the target, take the one whose KLs
sum to the least. Dynamic programming over the bits solves it exactly, where group sizes have a common divisor that
leaves no more than ``_MOST_UNITS`` steps (those of Llama-like models do); else to within one step per group.

Runs in different layouts measure the same KL only up to rounding, and a choice must not hang on the last digits: KLs
are compared after rounding to two digits, and of equal choices the one that gives earlier groups more bits is taken, of
two formats that do the same for a group the smaller. No torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, gcd

import numpy as np

from megaqad.quantization.formats import FORMATS

NVFP4_BITS, BF16_BITS = FORMATS["nvfp4"].bits, 16.0
BF16 = "bf16"
BITS = {"fp8": FORMATS["fp8"].bits, BF16: BF16_BITS}
"""Per weight, of what a group can be instead of NVFP4, by its name in ``formats.CHOICES``."""
_IN_LAYER = re.compile(r"(.*?\.\d+\.[^.]+)\..+")
_DIGITS = 2
_STEP = 0.5
"""Bits: what all formats differ by is a multiple."""
_MOST_UNITS = 200_000
"""Steps from all NVFP4 to all BF16. Where sizes have no large common divisor, they are rounded up to these steps, so
that the target still holds."""


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
    """Held-out KL in nats per token with every other group in BF16, and this one as the recipe says."""
    weights: int
    others: Mapping[str, float] = field(default_factory=dict)
    """The same KL in the formats that were tried instead, by name."""

    def kl_as(self, chosen: str | None) -> float:
        """KL in a format by name, in the recipe's own for None."""
        if chosen is None:
            return self.kl_to_teacher
        return 0.0 if chosen == BF16 else self.others[chosen]


def groups_of(modules: Sequence[str], sizes: Mapping[str, int]) -> list[Group]:
    """The groups of ``modules`` (Hugging Face names), in model order. ``sizes``: elements of each module's weight."""
    members: dict[str, list[str]] = {}
    for module in modules:
        inside = _IN_LAYER.fullmatch(module)
        members.setdefault(inside[1] if inside else module, []).append(module)
    return [Group(name, tuple(held), sum(sizes[module] for module in held)) for name, held in members.items()]


def average_bits(groups: Sequence[GroupKL], chosen: Mapping[str, str]) -> float:
    """Bits per weight over all groups, block scales included. ``chosen``: format by group, where it is not NVFP4."""
    bits = sum(group.weights * BITS.get(chosen.get(group.group, ""), NVFP4_BITS) for group in groups)
    return bits / sum(group.weights for group in groups)


def predicted_kl(groups: Sequence[GroupKL], chosen: Mapping[str, str]) -> float:
    """Sum of the groups' KLs under a choice, each measured alone."""
    return sum(group.kl_as(chosen.get(group.group)) for group in groups)


def choose(groups: Sequence[GroupKL], target_bits: float) -> dict[str, str]:
    """The groups that leave the recipe's NVFP4 and what they become, ``fp8`` or ``bf16``, in model order; under it
    ``average_bits`` is at most ``target_bits``.

    Args:
        groups: measured, in model order; FP8 is a candidate where it was measured.
        target_bits: at least ``NVFP4_BITS``, below ``BF16_BITS``.
    """
    assert NVFP4_BITS <= target_bits < BF16_BITS, f"{target_bits} bits are checked with the settings"
    total = sum(group.weights for group in groups)
    steps_to_bf16 = _steps(BF16_BITS)
    unit = max(gcd(*(group.weights for group in groups)), -(-total * steps_to_bf16 // _MOST_UNITS))
    room = floor(total * (target_bits - NVFP4_BITS) / _STEP + 1e-6) // unit

    # best[u]: the largest KL that more bits for the groups seen so far save in u units. Going from the last group to
    # the first makes earlier groups win ties.
    best = np.zeros(room + 1)
    picks = [_options(group, unit) for group in groups]
    picked = np.zeros((len(groups), room + 1), dtype=np.int8)  # 0: NVFP4, else which of the options
    for index in reversed(range(len(groups))):
        without = best.copy()
        for number, (_, saved, cost) in enumerate(picks[index], start=1):
            if cost > room or saved <= 0:
                continue
            with_it = without[: room + 1 - cost] + saved
            picked[index, cost:][with_it >= best[cost:]] = number
            best[cost:] = np.maximum(best[cost:], with_it)
    chosen = {}
    for index, group in enumerate(groups):
        if number := picked[index, room]:
            name, _, cost = picks[index][number - 1]
            chosen[group.group] = name
            room -= cost
    return chosen


def _options(group: GroupKL, unit: int) -> list[tuple[str, float, int]]:
    """(format, KL that it saves over NVFP4, units that it costs), the most bits first."""
    names = sorted([*group.others, BF16], key=lambda name: -BITS[name])
    here = _rounded(group.kl_to_teacher)
    return [
        (name, here - _rounded(group.kl_as(name)), -(-group.weights * _steps(BITS[name]) // unit)) for name in names
    ]


def _steps(bits: float) -> int:
    return round((bits - NVFP4_BITS) / _STEP)


def _rounded(kl: float) -> float:
    return float(f"{kl:.{_DIGITS - 1}e}")
