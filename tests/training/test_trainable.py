"""``train.trainable``: what it names moves, everything else keeps every bit, in any layout, also across a resume."""

import json
import shutil

import pytest

from megaqad.config import check_settings, load_settings
from megaqad.errors import UserError
from tests.faults.runs import SMALL, outcome
from tests.models.checkpoints import make_checkpoint
from tests.training.runs import distill, whole_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


def settings_of(model, run_dir, *overrides):
    return [
        *(f"model={model}", f"output_dir={run_dir}", *SMALL, "train.steps=2", "train.warmup_steps=0"),
        *("checkpoint.every=1", "evaluation.every=0", *overrides),
    ]


def moved(run_dir):
    """Names of the model's tensors that two steps have changed, and of all."""
    before = whole_tensors(run_dir / "ptq")
    after = whole_tensors(run_dir / "checkpoints" / "step_00000002")
    weights = {name for name in after if not name.startswith("optimizer.")}
    assert weights == set(before)
    return {name for name in weights if not (before[name] == after[name]).all()}, weights, set(after) - weights


LEARNED = "quantization.weight_scales=learned"
CASES = {
    "embeddings": ("['model.embed_tokens']", lambda name: name.startswith("model.embed_tokens.")),
    "second-half": (
        "['model.layers.[23].*']",
        lambda name: name.startswith(("model.layers.2.", "model.layers.3.")) and not name.endswith("input_amax"),
    ),
    "head-and-norm": ("[lm_head,model.norm]", lambda name: name.startswith(("lm_head.", "model.norm."))),
    "scales": ("[scales]", lambda name: name.endswith(("weight_amax", "weight_block_amax"))),
}
LAYOUTS = {
    "one": (1, []),
    "pp2": (2, ["parallel.pipeline=2", "train.recompute=true"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_only_what_is_named_moves(case, layout, model, run_ranks, tmp_path):
    """With two stages, all but the third case leave one of them, or its first layer, nothing to train."""
    pattern, belongs = CASES[case]
    ranks, overrides = LAYOUTS[layout]
    run_dir = tmp_path / "run"
    arguments = settings_of(model, run_dir, f"train.trainable={pattern}", LEARNED, *overrides)
    assert run_ranks(ranks, distill, arguments) == [None] * ranks
    changed, weights, moments = moved(run_dir)
    named = {name for name in weights if belongs(name)}
    assert changed <= named
    assert len(changed) >= 0.9 * len(named) > 0  # Adam moves what has a gradient; a scale's may be zero
    assert {name.split(".", 2)[2] for name in moments} == named

    whole = outcome(run_dir, 2)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    assert run_ranks(ranks, distill, arguments) == [None] * ranks
    assert outcome(run_dir, 2) == whole
    assert all(row["grad_norm"] > 0 for row in whole.metrics)


def test_layouts_agree(model, run_ranks, tmp_path):
    """A frozen first stage hands on the same gradients: same norms as on one rank."""
    norms = []
    for layout in ("one", "pp2"):
        ranks, overrides = LAYOUTS[layout]
        run_dir = tmp_path / layout
        arguments = settings_of(model, run_dir, "train.trainable=['model.layers.[03].*']", *overrides)
        assert run_ranks(ranks, distill, arguments) == [None] * ranks
        norms.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.trainable=[]"], "train.trainable=[] trains nothing"),
        (["train.trainable=['*.experts.*']"], "pattern '*.experts.*' matches no parameter"),
        (["train.trainable=[scales]"], "set quantization.weight_scales=learned"),
        (["train.trainable=['*.q_proj']"], "q_proj.weight but not model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_bad_patterns(overrides, named, model, tmp_path):
    with pytest.raises(UserError) as refusal:
        check_settings("distill", load_settings(settings_of(model, tmp_path / "run", *overrides)))
    assert named in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
