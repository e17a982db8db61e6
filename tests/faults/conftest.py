"""The fault matrix's runs and its table.

``FAULT_SEED`` chooses the random moments (default: new ones every time, printed), ``FAULT_MOMENTS`` their number.
"""

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Outcome, Runner, outcome
from tests.forked import CommandServer
from tests.models.checkpoints import make_checkpoint

SEED = int(os.environ.get("FAULT_SEED") or secrets.randbelow(10**6))
MOMENTS = int(os.environ.get("FAULT_MOMENTS") or 20)
TABLE: dict[str, list[str]] = {}
"""Fault -> what was seen, once per test that passed."""
NOTES: list[str] = []
"""Lines below the table."""


@pytest.fixture(scope="session")
def server() -> Iterator[CommandServer]:
    started = CommandServer()
    yield started
    started.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def runner(server, model, tmp_path_factory) -> Runner:
    """Two tensor-parallel ranks, the demo's layout."""
    return Runner(server, tmp_path_factory.mktemp("tensor"), model, ["parallel.tensor=2"])


@pytest.fixture(scope="session")
def reference(runner) -> Outcome:
    """What an uninterrupted run gives."""
    runner.finish(runner.folder / "reference")
    return outcome(runner.folder / "reference")


@pytest.fixture(scope="session")
def moments() -> random.Random:
    return random.Random(SEED)


@pytest.fixture
def report():
    """Add to the table: the fault, what was seen, in words. Reached only when the test's assertions hold."""

    def add(fault: str, seen: str) -> None:
        TABLE.setdefault(fault, []).append(seen)

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    if not TABLE and not NOTES:
        return
    terminalreporter.write_sep("=", f"fault matrix, FAULT_SEED={SEED}")
    terminalreporter.write_line("| fault | times | seen | weights, moments, random state and metrics after going on |")
    terminalreporter.write_line("|---|---|---|---|")
    for fault, seen in TABLE.items():
        words = "; ".join(dict.fromkeys(seen))
        terminalreporter.write_line(f"| {fault} | {len(seen)} | {words} | equal, bit for bit |")
    for note in NOTES:
        terminalreporter.write_line(note)
