"""Two tensor-parallel ranks get the gradients of one, which are transformers'."""

from pathlib import Path

import numpy as np
import pytest

from megaqad.runtime.ranks import ParallelSizes
from tests.families.checkpoints import make_checkpoint, random_tokens, settings
from tests.models.megatron_runs import logit_gradients
from tests.models.test_gradients import transformers_gradients
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("case", "sequence"),
    [
        ("gemma3", False),
        ("gemma3", True),  # norms of the residual stream see half of the sequence each
        ("gemma3_one_group", True),  # both ranks have a copy of the key head
        ("olmo2", False),  # norms over the heads of both ranks
        ("olmo2", True),
        ("olmo2_one_group", False),
        ("phi3", False),
    ],
)
def test_gradients_do_not_depend_on_the_ranks(case: str, sequence: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(case, tmp_path)
    vocabulary = settings(case)["vocab_size"]
    tokens = random_tokens(vocabulary, length=24)
    weights = np.random.default_rng(3).standard_normal((*tokens.shape, vocabulary), dtype=np.float32)
    batch = {"tokens": tokens, "weights": weights, "recompute": False}
    one = run_ranks(1, logit_gradients, folder, ParallelSizes(), batch)[0]
    two = run_ranks(2, logit_gradients, folder, ParallelSizes(tensor=2, sequence=sequence), batch)[0]
    expected = transformers_gradients(folder, tokens, weights)
    assert set(one) == set(two) == set(expected)
    for name, gradient in one.items():
        largest = np.abs(gradient).max()
        assert largest > 0, name
        assert np.abs(two[name] - gradient).max() <= 2e-5 * largest, name
        assert np.abs(gradient - expected[name].numpy()).max() <= 2e-5 * largest, name
