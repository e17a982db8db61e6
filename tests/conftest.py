"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("WANDB_MODE", "offline")

from tests import ranks


@pytest.fixture(scope="session", autouse=True)
def _rank_pool() -> Iterator[None]:
    yield
    ranks.close_ranks()


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return ranks.run_ranks
