"""Fixtures shared by all tests.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before anything imports triton.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests import ranks


@pytest.fixture(scope="session", autouse=True)
def _rank_pool() -> Iterator[None]:
    yield
    ranks.close_ranks()


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return ranks.run_ranks
