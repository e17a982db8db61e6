"""However a run is divided among ranks, it trains the same student and exports the same bytes."""

import pytest

from tests.distillation.runs import export_digests, train_curve
from tests.models.checkpoints import make_checkpoint

LAYOUTS = {
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2, sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "pipeline 2, interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "data 2": (2, []),
    "tensor 2 x pipeline 2, interleaved": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
}
QAT_WITHOUT_QUANTIZATION = ["quantization=none", "distill.objective=qat", "train.steps=20"]
# A flipped code changes a token's KL by as much as the KL itself: only a mean over many tokens is the same everywhere.
MANY_TOKENS = [
    "data.max_train_tokens=16385",
    "train.sequence_length=128",
    "train.global_batch_size=128",
    "train.micro_batch_size=32",
]
QAD_IN_NVFP4 = ["quantization=nvfp4", "distill.objective=qad", "train.steps=8", "train.lr=6e-5", *MANY_TOKENS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Qwen3: with q and k norms, whose gradients must be summed over the tensor-parallel ranks."""
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def one_rank_curves(model, tmp_path_factory):
    """Loss curves on one rank, made on first use."""
    from tests.ranks import run_ranks

    curves: dict[str, list[dict]] = {}

    def curve(name, overrides):
        if name not in curves:
            output = tmp_path_factory.mktemp("one") / name
            arguments = [f"model={model}", f"output_dir={output}", *overrides]
            curves[name] = run_ranks(1, train_curve, arguments)[0]
        return curves[name]

    return curve


def layouts(names, slow):
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize(
    "layout",
    layouts(
        ["tensor 2, sequence", "pipeline 2, interleaved", "data 2", "tensor 2 x pipeline 2, interleaved"],
        slow=["tensor 2", "pipeline 2"],  # their parts are in the others
    ),
)
def test_same_curve_in_every_layout(model, one_rank_curves, run_ranks, tmp_path, layout):
    compare_curves(model, one_rank_curves, run_ranks, tmp_path, layout, QAT_WITHOUT_QUANTIZATION, 1e-4)


@pytest.mark.parametrize(
    "layout", layouts(["data 2"], slow=["tensor 2, sequence", "tensor 2 x pipeline 2, interleaved"])
)
def test_same_curve_in_nvfp4(model, one_rank_curves, run_ranks, tmp_path, layout):
    compare_curves(model, one_rank_curves, run_ranks, tmp_path, layout, QAD_IN_NVFP4, 2e-2)


def compare_curves(model, one_rank_curves, run_ranks, tmp_path, layout, objective, tolerance):
    """Train in ``layout`` and on one rank; loss and gradient norm of every step agree."""
    expected = one_rank_curves(objective[0], objective)
    ranks, sizes = LAYOUTS[layout]
    found = run_ranks(ranks, train_curve, [f"model={model}", f"output_dir={tmp_path / 'run'}", *objective, *sizes])[0]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    losses = [row["loss"] for row in expected]
    assert losses[-1] < 0.9 * losses[0], "little was learned: the comparison would prove little"
    for ours, reference in zip(found, expected, strict=True):
        assert ours["tokens"] == reference["tokens"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=5 * tolerance)


@pytest.mark.parametrize(
    "recipe",
    [
        ["quantization=nvfp4"],
        ["quantization=nvfp4_kv_fp8", "quantization.exclude=[]", "quantization.formats={*_attn*:fp8,lm_head:fp8}"],
    ],
)
def test_same_bytes_at_step_zero(model, run_ranks, tmp_path, recipe):
    expected = run_ranks(1, export_digests, [f"model={model}", f"output_dir={tmp_path / 'one'}", *recipe])[0]
    assert "model.safetensors" in expected
    for name, (ranks, sizes) in LAYOUTS.items():
        found = run_ranks(ranks, export_digests, [f"model={model}", f"output_dir={tmp_path / name}", *recipe, *sizes])[
            0
        ]
        assert found == expected, name
