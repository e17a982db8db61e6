"""Available memory, as a file system in a folder tells it."""

from pathlib import Path

import pytest

from megaqad.runtime.memory import available_memory

MACHINE = {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n"}
FREE = 3000 * 1024


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, FREE),
        ({"proc/self/cgroup": "0::/job/step\n"}, FREE),  # no limits
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "500000\n",
                "sys/fs/cgroup/job/memory.current": "400000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 350000\ninactive_file 50000\n",
            },
            150_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/not/mounted/here\n3:cpu:/\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "300000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 120000\n",
            },
            20_000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",  # version 1's "none"
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            },
            FREE,
        ),
    ],
    ids=["no groups", "no limits", "a parent's limit", "version 1 in a container", "version 1 without limit"],
)
def test_the_least_that_is_left(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, content in (MACHINE | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_memory(tmp_path) == expected


def test_this_machine_has_some() -> None:
    assert available_memory() > 2**20
