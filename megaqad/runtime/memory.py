"""How much memory this process may still take."""

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that are free or can be freed, within the limits of this process's control groups.

    Slurm and containers limit memory by control groups, of which the machine's own numbers say nothing. Where the
    system says nothing either, half of what is built in.

    Args:
        root: of the file system.
    """
    facts = _numbers(root / "proc/meminfo")
    if "MemAvailable:" not in facts:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([facts["MemAvailable:"] * 1024, *_left_in_groups(root)])


CONTROLLERS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of control groups version 2 and 1: where they are, the files of limit and use, what of the use can be freed."""


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left under each limit that applies."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in CONTROLLERS:
            continue
        place, limit_file, use_file, cached = CONTROLLERS[controllers]
        own = root / place / path.lstrip("/")
        for group in [own, *own.parents[: len(Path(path).parts) - 1]]:
            limit = (group / limit_file).read_text().strip() if (group / limit_file).is_file() else "max"
            if limit != "max":
                free = int(limit) - int((group / use_file).read_text())
                yield max(0, free + _numbers(group / "memory.stat").get(cached, 0))


def _numbers(path: Path) -> dict[str, int]:
    """Second word by first of each line."""
    rows = (line.split() for line in path.read_text().splitlines()) if path.is_file() else ()
    return {row[0]: int(row[1]) for row in rows}
