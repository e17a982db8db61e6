"""A student that is its own teacher trains what a separate teacher of the same weights trains, and holds one model."""

import pytest
import torch

from megaqad.bench.memory import peak_memory
from megaqad.commands.session import Session
from megaqad.commands.teaching import teacher_of
from megaqad.config import check_settings, load_settings
from megaqad.distillation.teachers import LiveTeacher, SelfTeacher, Teacher
from megaqad.errors import UserError
from megaqad.runtime.parallel import shutdown_parallel
from megaqad.training.freezing import freeze
from tests.distillation.runs import SMALL_RUN, train_curve
from tests.models.checkpoints import make_checkpoint
from tests.training.runs import differences, losses, whole_tensors

STEPS = 3
LEARNED = [
    "quantization=nvfp4",
    "quantization.weight_scales=learned",
    "quantization.scale_lr=3e-3",
    "train.trainable=[scales]",
    "train.warmup_steps=0",
]
CASES = {
    "BF16, some of the scales, recomputed": (
        1,
        ["runtime.dtype=bfloat16", "train.trainable=['*.layers.[02].*.weight_scale']", "train.recompute=true"],
    ),
    "all rounded, beside cosine": (
        1,
        [
            "quantization=nvfp4_kv_fp8",
            "quantization.exclude=[]",
            "distill.hidden.weight=0.3",
            "distill.loss={jsd:1,cross_entropy:0.1}",
        ],
    ),
    "tensor 2 x pipeline 2, sequence, interleaved": (
        4,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


def run_of(model, output, *overrides):
    return [f"model={model}", f"output_dir={output}", f"train.steps={STEPS}", *LEARNED, *overrides]


@pytest.mark.parametrize("case", CASES)
def test_as_a_separate_teacher_bit_for_bit(model, run_ranks, tmp_path, case):
    ranks, overrides = CASES[case]
    curves, trained = [], []
    for teacher in ("self", "model"):
        run_dir = tmp_path / teacher
        arguments = run_of(model, run_dir, f"distill.teacher={teacher}", *overrides)
        curves.append(run_ranks(ranks, train_curve, arguments)[0])
        trained.append(whole_tensors(run_dir / "checkpoints" / f"step_{STEPS:08d}"))
    assert torch.equal(losses(curves[0]), losses(curves[1]))
    assert [row["grad_norm"] for row in curves[0]] == [row["grad_norm"] for row in curves[1]]
    assert len(set(losses(curves[0]).tolist())) == STEPS, "nothing was learned"
    assert differences(*trained) == []


def extra_bytes(rank: int, world_size: int, overrides: list[str]) -> tuple[int, int, int]:
    """What this rank's parameters take; tensor bytes that the teacher takes, and that its pass takes at its peak."""
    settings = load_settings([*SMALL_RUN, *overrides])
    session = Session.start(settings)
    try:
        student = session.calibrated_student()
        freeze(student, session.description, settings.train.trainable)
        made: list[Teacher] = []
        held = peak_memory(lambda: made.append(teacher_of(session, student)), session.context.device).tensor_bytes
        assert isinstance(made[0], SelfTeacher if settings.distill.teacher == "self" else LiveTeacher)
        tokens = [torch.arange(16).view(1, 16)]
        passing = peak_memory(lambda: made[0].last_hidden(tokens), session.context.device).tensor_bytes
        weights = sum(one.numel() * one.element_size() for chunk in student for one in chunk.parameters())
        return weights, held, passing
    finally:
        shutdown_parallel()


@pytest.mark.filterwarnings("ignore:Profiler")
def test_no_second_copy_of_the_weights(model, run_ranks, tmp_path):
    [(weights, held, passing)] = run_ranks(1, extra_bytes, run_of(model, tmp_path, "distill.teacher=self"))
    assert held < weights / 100
    assert passing < weights / 2
    [(weights, held, _)] = run_ranks(1, extra_bytes, run_of(model, tmp_path, f"distill.teacher={model}"))
    assert held > weights / 2, "what a second copy would show"


@pytest.mark.parametrize("command", ["distill", "recover"])
@pytest.mark.parametrize(
    ("trainable", "named"),
    [("['*']", "model.embed_tokens"), ("[scales,'*.layers.2.*']", "model.layers.2."), ("[model.norm]", "model.norm")],
)
def test_trained_weights_are_refused_before_anything_is_built(model, tmp_path, command, trainable, named):
    """They would move the teacher with them."""
    arguments = run_of(model, tmp_path / "run", "distill.teacher=self", f"train.trainable={trainable}", *SMALL_RUN)
    with pytest.raises(UserError) as refusal:
        check_settings(command, load_settings(arguments))
    for words in ("distill.teacher=self", named, "is trained", "train.trainable", "distill.teacher=model"):
        assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("overrides", [["distill.objective=qat"], ["distill.loss={cross_entropy:1}"]])
def test_where_nothing_is_asked_of_the_teacher_all_may_train(model, tmp_path, overrides):
    arguments = run_of(model, tmp_path / "run", "distill.teacher=self", "train.trainable=['*']", *SMALL_RUN, *overrides)
    check_settings("distill", load_settings(arguments))
