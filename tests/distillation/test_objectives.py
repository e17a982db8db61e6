"""Every objective, teacher and hidden-state loss trains in a divided run what it trains on one rank."""

import pytest

from tests.distillation.runs import train_curve
from tests.models.checkpoints import make_checkpoint

TENSOR_2_PIPELINE_2 = ["parallel.tensor=2", "parallel.pipeline=2"]
INTERLEAVED = [*TENSOR_2_PIPELINE_2, "parallel.virtual_pipeline=2"]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=true"]
COMMON = ["quantization=none", "train.steps=2", "distill.teacher={other}"]
OBJECTIVES = {
    "forward_kl": (TENSOR_2_PIPELINE_2, ["distill.temperature=2"]),
    "reverse_kl": (TENSOR_2_PIPELINE_2, ["distill.loss={{reverse_kl:1}}"]),
    "jsd": (TENSOR_2_PIPELINE_2, ["distill.loss={{jsd:1}}", "distill.beta=0.3"]),
    "logit_mse": (TENSOR_2_PIPELINE_2, ["distill.loss={{logit_mse:1}}"]),
    "cross_entropy": (TENSOR_2_PIPELINE_2, ["distill.loss={{cross_entropy:2}}"]),
    "mixture": (TENSOR_2_PIPELINE_2, ["distill.loss={{forward_kl:0.9,cross_entropy:0.1}}"]),
    "cosine": (INTERLEAVED, ["distill.hidden.weight=0.7", "distill.teacher=model", "distill.loss={{cross_entropy:1}}"]),
    "cka": (INTERLEAVED, ["distill.hidden.weight=5", "distill.hidden.kind=cka"]),
    "cka of two layers, sequence, recomputed": (
        SEQUENCE,
        ["distill.hidden.weight=5", "distill.hidden.kind=cka", "distill.hidden.layers=[1,3]"],
    ),
}


WIDE = {"hidden_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and a teacher that is wider and twice as deep; both know 257 tokens."""
    folder = tmp_path_factory.mktemp("models")
    return make_checkpoint("qwen3", folder / "student"), make_checkpoint("qwen3", folder / "other", seed=5, **WIDE)


def train(run_ranks, models, output, ranks, overrides):
    student, other = models
    arguments = [f"model={student}", f"output_dir={output}", *(part.format(other=other) for part in COMMON + overrides)]
    return run_ranks(ranks, train_curve, arguments)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_divided_run_equals_one_rank(models, run_ranks, tmp_path, objective):
    layout, overrides = OBJECTIVES[objective]
    ranks = 2 if layout is SEQUENCE else 4
    expected = train(run_ranks, models, tmp_path / "one", 1, overrides)
    found = train(run_ranks, models, tmp_path / "run", ranks, [*overrides, *layout])
    for ours, reference in zip(found, expected, strict=True):
        assert ours["tokens"] == reference["tokens"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=5e-4)
    assert expected[0]["grad_norm"] > 0
