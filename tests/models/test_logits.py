"""Imported checkpoints compute what transformers computes, in every layout."""

from pathlib import Path

import pytest
import torch

from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens, transformers_logits
from tests.models.megatron_runs import local_logits, whole_logits
from tests.ranks import run_ranks

LAYOUTS = {
    "tp1": ParallelSizes(),
    "tp2": ParallelSizes(tensor=2),
    "tp2_sp": ParallelSizes(tensor=2, sequence=True),
    "tp4": ParallelSizes(tensor=4),
    "pp2": ParallelSizes(pipeline=2),
    "pp4": ParallelSizes(pipeline=4),
    "pp2_interleaved": ParallelSizes(pipeline=2, virtual_pipeline=2),
    "tp2_sp_pp2_interleaved": ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    case = request.param
    folder = make_checkpoint(case, tmp_path_factory.mktemp(case))
    tokens = random_tokens(CASES[case]["vocab_size"])
    return folder, tokens, transformers_logits(folder, tokens)


# three key/value heads do not divide by two; two layers make no interleaved pipeline
USUAL = [name for name in LAYOUTS if name not in ("tp4", "pp4")]
FITTING = [(case, name) for case in CASES for name in USUAL if case != "llama_three_groups" or name in {"tp1", "pp2"}]
FITTING += [("llama_five_layers", name) for name in ("tp4", "pp4")]


@pytest.mark.parametrize(("checkpoint", "layout"), FITTING, indirect=["checkpoint"])
def test_logits_equal_transformers(checkpoint: tuple, layout: str) -> None:
    folder, tokens, expected = checkpoint
    sizes = LAYOUTS[layout]
    logits = whole_logits(run_ranks(sizes.model_ranks, local_logits, Path(folder), sizes, tokens))
    assert logits.shape == expected.shape
    error = (logits - expected).norm() / expected.norm()
    assert error < 1e-5
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
