"""Two records of a case, compared: which values differ, and by how much."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.golden.runs import Record

MOST_NAMED = 4


@dataclass(frozen=True)
class Difference:
    """One value that differs. ``None`` stands for a value that one side lacks."""

    path: str
    expected: Any
    found: Any

    @property
    def relative(self) -> float | None:
        """|found - expected| / |expected|; None where they are not both numbers."""
        if not isinstance(self.expected, float) or not isinstance(self.found, float):
            return None
        return abs(self.found - self.expected) / abs(self.expected) if self.expected else math.inf


def differences(expected: Any, found: Any, path: str) -> Iterator[Difference]:
    """Every value that is not equal bit for bit."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            yield from differences(expected.get(key), found.get(key), f"{path}.{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True), start=1):
            yield from differences(one, other, f"{path}[{number}]")
    elif type(expected) is not type(found) or expected != found:
        yield Difference(path, expected, found)


def describe(expected: Record, found: Record) -> list[str]:
    """One line per part of ``found`` that differs; none where all is equal. A failed run has fewer parts."""
    lines = []
    for part in found:
        wrong = list(differences(expected.get(part), found.get(part), part))
        numbers = [one for one in wrong if one.relative is not None]
        others = [one for one in wrong if one.relative is None]
        if numbers:
            largest = max(numbers, key=lambda one: one.relative or 0.0)
            lines.append(
                f"{part}: {len(numbers)} numbers differ, first {_said(numbers[0])}; "
                f"most, by {largest.relative:.1e}: {_said(largest)}"
            )
        if others:
            named = ", ".join(_said(one) for one in others[:MOST_NAMED])
            more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
            lines.append(f"{part}: {len(others)} of {_count(expected.get(part))} values differ: {named}{more}")
    return lines


def _said(one: Difference) -> str:
    name = one.path.partition(".")[2] or one.path
    if one.expected is None:
        return f"{name} is new"
    if one.found is None:
        return f"{name} is gone"
    if isinstance(one.expected, str) and isinstance(one.found, str):
        return name  # two digests say nothing
    return f"{name} {one.expected!r} -> {one.found!r}"


def _count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count(inner) for inner in value.values())
    if isinstance(value, list):
        return sum(_count(inner) for inner in value)
    return 1
