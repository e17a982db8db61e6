"""Tests for machines with a CUDA GPU: ``pytest tests/gpu``. Without one they are collected and skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip what stands in this folder where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
