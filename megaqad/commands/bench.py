"""``megaqad bench kl | nvfp4 | step | blackwell``: one JSON line per measurement on standard output.

Speeds are compared within one process, in turns; a ratio is worth reading, an absolute time is of this machine. The
measurements themselves are in ``benchmarks/``, which is no part of what the other commands need.
"""

import importlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from megaqad.config import Settings
from megaqad.errors import UserError


def bench_kl() -> None:
    """``megaqad bench kl``, on one process, or every rank's part of it under torchrun: the vocabulary sharded."""
    _print_rows(_benchmark("kl").rows())


def bench_nvfp4() -> None:
    """``megaqad bench nvfp4``, on one process."""
    _print_rows(_benchmark("nvfp4").bench_nvfp4())


def bench_blackwell() -> None:
    """``megaqad bench blackwell``, on one process."""
    _print_rows(_benchmark("blackwell").rows())


def bench_step(settings: Settings, *, profile: bool = False) -> None:
    """Every rank's part of ``megaqad bench step``; ``--profile``: with the kernels of a QAD step."""
    _print_rows(_benchmark("step").rows(settings, profile=profile))


def _benchmark(name: str) -> Any:
    """A module of ``benchmarks``, which a wheel has inside the package and a checkout beside it."""
    package = "megaqad.benchmarks" if find_spec("megaqad.benchmarks") is not None else "benchmarks"
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in (package, f"{package}.{name}"):
            raise
        raise UserError(
            f"megaqad bench {name} needs the directory benchmarks/ of the source tree: install from a checkout of it"
        ) from None


def _print_rows(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)
