"""``megaqad logits`` gives transformers' logits in any layout: an odd vocabulary, an odd number of sequences."""

import numpy as np
import pytest

from megaqad.config import load_settings
from tests.models.checkpoints import make_checkpoint, random_tokens, transformers_logits


def write_logits(rank, world_size, overrides):
    from megaqad.commands.logits import logits
    from megaqad.runtime.ranks import shutdown_parallel

    try:
        logits(load_settings(overrides))
    finally:
        shutdown_parallel()


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    ],
)
def test_logits_equal_transformers(run_ranks, tmp_path, ranks, layout):
    model = make_checkpoint("llama", tmp_path / "model")
    tokens = random_tokens(515, batch=3)
    np.save(tmp_path / "tokens.npy", tokens)
    settings = [f"model={model}", f"output_dir={tmp_path / 'run'}", f"tokens={tmp_path / 'tokens.npy'}"]
    run_ranks(ranks, write_logits, [*settings, "quantization=none", "runtime.dtype=float32", *layout])
    expected = transformers_logits(model, tokens).numpy()
    found = np.load(tmp_path / "run" / "logits.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
