"""Gradients through head, layers and embedding equal transformers', after Megatron-Core's own reductions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import CASES, make_checkpoint, random_tokens
from tests.models.megatron_runs import logit_gradients
from tests.ranks import run_ranks


def transformers_gradients(folder: Path, tokens: np.ndarray, weights: np.ndarray) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    (model(torch.from_numpy(tokens)).logits * torch.from_numpy(weights)).sum().div(tokens.size).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("case", "sizes", "recompute"),
    [
        # the tied head on its own stage, bias and padded vocabulary
        ("qwen2", ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True), False),
        # norms over heads, whose gradients every tensor-parallel rank has a part of
        ("qwen3", ParallelSizes(tensor=2), False),
        ("llama", ParallelSizes(pipeline=2), True),
        # fewer key/value heads than ranks: two ranks share each
        ("llama_five_layers", ParallelSizes(tensor=4), False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients_equal_transformers(case: str, sizes: ParallelSizes, recompute: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(case, tmp_path)
    tokens = random_tokens(CASES[case]["vocab_size"], batch=2, length=16)
    weights = np.random.default_rng(3).standard_normal((*tokens.shape, CASES[case]["vocab_size"]), dtype=np.float32)
    expected = transformers_gradients(folder, tokens, weights)
    batch = {"tokens": tokens, "weights": weights, "recompute": recompute}
    found = run_ranks(sizes.model_ranks, logit_gradients, folder, sizes, batch)[0]
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = (torch.from_numpy(found[name]) - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error}"
