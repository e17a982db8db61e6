"""A student that is its own teacher trains what a separate teacher of the same weights trains, and holds one model and
the originals of what it trains."""

import gc
import shutil
from functools import partial

import pytest
import torch

from benchmarks.measure import peak_memory
from megaqad.config import check_settings, load_settings
from megaqad.distillation.teachers import LiveTeacher, SelfTeacher
from megaqad.errors import UserError
from megaqad.models.model import QuantizerParameter
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import teacher_of
from megaqad.runtime.ranks import shutdown_parallel
from megaqad.training.freezing import freeze
from megaqad.training.logs import read_metrics
from tests.distillation.runs import SMALL_RUN, train_curve, without_teacher
from tests.models.checkpoints import make_checkpoint
from tests.training.runs import differences, distill, losses, whole_tensors

STEPS = 3
FOUR_RANKS = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]
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
    "tensor 2 x pipeline 2, sequence, interleaved": (4, FOUR_RANKS),
}
SUBSETS = {
    "embedding, rounded head, norms and a layer, in BF16, recomputed, beside cosine": (
        "llama",
        1,
        [
            "train.trainable=[model.embed_tokens,lm_head,'*norm','model.layers.1.*']",
            "quantization.exclude=[]",
            "runtime.dtype=bfloat16",
            "train.recompute=true",
            "distill.hidden.weight=0.3",
        ],
    ),
    "layers and all scales, tensor 2": (
        "llama",
        2,
        ["train.trainable=[scales,'model.layers.[02].*']", "quantization.weight_scales=learned", "parallel.tensor=2"],
    ),
    "tied embedding and biases, pipeline 2 x data 2": (
        "qwen2",
        4,
        ["train.trainable=[model.embed_tokens,'*.bias']", "parallel.pipeline=2", "parallel.data=2"],
    ),
    "head and MLPs, each token's scales, tensor 2 x pipeline 2, sequence, interleaved": (
        "llama",
        4,
        ["train.trainable=[lm_head,'*.mlp.*']", "quantization.activation_scales=dynamic", *FOUR_RANKS],
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


@pytest.mark.parametrize("case", SUBSETS)
def test_originals_of_what_is_trained_teach_bit_for_bit(run_ranks, tmp_path, case):
    """As a separate teacher, also gone on with after the first step, when the student's weights are no originals. The
    held-out numbers are the same too, and no second model is loaded for them."""
    family, ranks, overrides = SUBSETS[case]
    options = [
        *SMALL_RUN,
        f"model={make_checkpoint(family, tmp_path / 'original')}",
        *("quantization=nvfp4", f"train.steps={STEPS}", "train.warmup_steps=0", *overrides),
        *("checkpoint.every=1", f"checkpoint.keep={STEPS}", "evaluation.every=1"),
    ]

    def trained(teacher, train):
        run_dir = tmp_path / teacher
        arguments = [*options, f"output_dir={run_dir}", f"distill.teacher={teacher}"]
        assert run_ranks(ranks, train, arguments) == [None] * ranks
        rows = read_metrics(run_dir / "metrics.jsonl")
        numbers = [(row["step"], row["loss"], row["grad_norm"], row["validation"]) for row in rows]
        return numbers, whole_tensors(run_dir / "checkpoints" / f"step_{STEPS:08d}")

    expected, tensors = trained("model", distill)
    assert len({loss for _, loss, *_ in expected}) == STEPS, "nothing was learned"
    for _ in ("from the start", "after the first step"):
        numbers, found = trained("self", partial(without_teacher, train=distill))
        assert numbers == expected
        assert differences(found, tensors) == []
        for step in range(2, STEPS + 1):
            shutil.rmtree(tmp_path / "self" / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize(
    "layout",
    [["parallel.tensor=2"], pytest.param(["parallel.pipeline=2"], marks=pytest.mark.slow)],
    ids=["tensor 2", "pipeline 2"],
)
def test_gone_on_with_in_another_layout(model, run_ranks, tmp_path, layout):
    """Begun on one rank; the originals are those of the new layout's parts, so a separate teacher teaches the same."""
    options = [
        *(*SMALL_RUN, f"model={model}", "quantization=nvfp4", f"train.steps={STEPS}", "train.warmup_steps=0"),
        *("train.trainable=[lm_head,'*norm','model.layers.[13].*']", "checkpoint.every=1", f"checkpoint.keep={STEPS}"),
    ]
    begun, trained = tmp_path / "begun", []
    assert run_ranks(1, distill, [*options, f"output_dir={begun}", "distill.teacher=self"]) == [None]
    for step in range(2, STEPS + 1):
        shutil.rmtree(begun / "checkpoints" / f"step_{step:08d}")
    for teacher in ("self", "model"):
        run_dir = tmp_path / teacher
        shutil.copytree(begun, run_dir, symlinks=True)
        resumed = [*options, f"output_dir={run_dir}", f"distill.teacher={teacher}", "resume.allow=[distill.teacher]"]
        assert run_ranks(2, distill, [*resumed, *layout]) == [None, None]
        rows = [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir / "metrics.jsonl")]
        trained.append((rows, whole_tensors(run_dir / "checkpoints" / f"step_{STEPS:08d}")))
    assert [step for step, *_ in trained[0][0]] == list(range(1, STEPS + 1))
    assert trained[0][0] == trained[1][0]
    assert differences(trained[0][1], trained[1][1]) == []


def live_bytes() -> int:
    """Of the memory behind all tensors of this process."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter, QuantizerParameter)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def extra_bytes(rank: int, world_size: int, overrides: list[str]) -> tuple[int, int, int, int]:
    """What this rank's parameters take, and those that are trained; what tensors take more once the teacher is there,
    and what its pass takes at its peak."""
    settings = load_settings([*SMALL_RUN, *overrides])
    session = Session.start(settings)
    try:
        student = session.calibrated_student()
        freeze(student, settings.train.trainable)
        before = live_bytes()
        teacher = teacher_of(session, student)
        held = live_bytes() - before
        assert isinstance(teacher, SelfTeacher if settings.distill.teacher == "self" else LiveTeacher)
        tokens = [torch.arange(16).view(1, 16)]
        passing = peak_memory(lambda: teacher.last_hidden(tokens), session.ranks.device).tensor_bytes
        sizes = [(one.nbytes, one.requires_grad) for chunk in student.chunks for one in chunk.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        return sum(size for size, _ in sizes), trained, held, passing
    finally:
        shutdown_parallel()


@pytest.mark.filterwarnings("ignore:Profiler")
def test_no_second_copy_of_the_weights(model, run_ranks, tmp_path):
    [(weights, _, held, passing)] = run_ranks(1, extra_bytes, run_of(model, tmp_path, "distill.teacher=self"))
    assert held == 0
    assert passing < weights / 2
    [(weights, _, held, _)] = run_ranks(1, extra_bytes, run_of(model, tmp_path, f"distill.teacher={model}"))
    assert held > weights / 2, "what a second copy would show"


@pytest.mark.filterwarnings("ignore:Profiler")
def test_only_what_is_trained_is_kept(run_ranks, tmp_path):
    """Two of twelve layers: their weights, and in its pass nothing that grows with them."""
    model = make_checkpoint("llama", tmp_path / "model", num_hidden_layers=12)
    part = run_of(model, tmp_path, "distill.teacher=self", "train.trainable=['model.layers.[37].*.weight']")
    [(weights, trained, held, passing)] = run_ranks(1, extra_bytes, part)
    assert weights / 10 < trained < weights / 5
    assert held == trained
    [(_, _, _, passing_without)] = run_ranks(1, extra_bytes, run_of(model, tmp_path, "distill.teacher=self"))
    assert passing < passing_without + trained / 100


@pytest.mark.parametrize("command", ["distill", "recover"])
@pytest.mark.parametrize("trainable", ["['*']", "[scales,'model.layers.*',model.embed_tokens,lm_head,model.norm]"])
def test_training_every_weight_is_refused_before_anything_is_built(model, tmp_path, command, trainable):
    """The originals would be a second model, which was not to be."""
    arguments = run_of(model, tmp_path / "run", "distill.teacher=self", f"train.trainable={trainable}", *SMALL_RUN)
    with pytest.raises(UserError) as refusal:
        check_settings(command, load_settings(arguments))
    for words in ("distill.teacher=self", "train.trainable=[", "is every weight", "distill.teacher=model"):
        assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_all_but_one_norm_may_train(model, tmp_path):
    patterns = "train.trainable=['model.layers.*',model.embed_tokens,lm_head]"
    check_settings("distill", load_settings(run_of(model, tmp_path, "distill.teacher=self", patterns, *SMALL_RUN)))


def test_a_run_may_change_over_but_not_leave_trained_weights_to_the_teacher(model, run_ranks, tmp_path):
    """From a separate teacher to itself, in the middle of a run, for the same bits; never with fewer trained: what
    rests then is no original any more."""
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "step_00000002"
    run = [*SMALL_RUN, f"model={model}", f"output_dir={run_dir}", "quantization=nvfp4", "train.warmup_steps=0"]
    run += ["train.steps=2", "checkpoint.every=1", "train.trainable=[lm_head,'model.layers.1.*']"]
    itself = [*run, "distill.teacher=self", "resume.allow=[distill.teacher,train.trainable]"]
    assert run_ranks(1, distill, run) == [None]
    expected = whole_tensors(last)
    shutil.rmtree(last)
    [message] = run_ranks(1, distill, [*itself, "train.trainable=[lm_head]"])
    assert "step_00000001 holds optimizer.exp_avg.model.layers.1." in message
    assert run_ranks(1, distill, itself) == [None]
    assert differences(whole_tensors(last), expected) == []


@pytest.mark.parametrize("overrides", [["distill.objective=qat"], ["distill.loss={cross_entropy:1}"]])
def test_where_nothing_is_asked_of_the_teacher_all_may_train(model, tmp_path, overrides):
    arguments = run_of(model, tmp_path / "run", "distill.teacher=self", "train.trainable=['*']", *SMALL_RUN, *overrides)
    check_settings("distill", load_settings(arguments))
