"""On a GPU with NVFP4: a Transformer Engine layer is the emulated layer, forward and backward."""

import pytest
import torch

from megaqad.quantization import backend

BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= backend.LEAST_CAPABILITY
pytestmark = [
    pytest.mark.skipif(not BLACKWELL, reason="no GPU with NVFP4 (compute capability 10.0)"),
    pytest.mark.skipif(backend._transformer_engine_version() is None, reason="Transformer Engine is not installed"),
]


def test_what_bench_blackwell_checks():
    from benchmarks.blackwell import rows

    found = list(rows())
    assert [row for row in found if not row.get("passed", True)] == []
    print(*found, sep="\n")
