"""Teachers: another checkpoint, a cache of hidden states, the student itself; and what each refuses."""

import shutil
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import nn

from megaqad.config import load_settings
from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.teachers import SelfTeacher
from megaqad.models.load import load_weights, original_values
from megaqad.models.model import Model
from megaqad.quantization.model import sites
from megaqad.quantization.site import QuantizerMode
from megaqad.recovery.session import Session
from megaqad.runtime.ranks import shutdown_parallel
from megaqad.training.freezing import freeze
from megaqad.training.logs import read_metrics
from megaqad.training.optimizer import wrap_for_training
from tests.distillation.runs import SMALL_RUN, train_curve, without_teacher
from tests.faults.injection import spoiled_embedding
from tests.models.checkpoints import make_checkpoint
from tests.training.runs import differences, distill, losses, whole_tensors

WIDE = {"hidden_size": 96, "num_hidden_layers": 8}
LAYOUTS = {
    "one rank": (1, ["quantization=nvfp4", "runtime.dtype=bfloat16"]),
    "tensor 2, sequence, pipeline 2, interleaved": (
        4,
        [
            "quantization=none",
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
        ],
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student with 515 tokens, and another, wider and deeper teacher with the same."""
    folder = tmp_path_factory.mktemp("models")
    return make_checkpoint("llama", folder / "student"), make_checkpoint("llama", folder / "other", seed=5, **WIDE)


def run_of(models, output, *overrides):
    return [f"model={models[0]}", f"output_dir={output}", "train.steps=3", *overrides]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_the_cache_as_from_the_teacher_bit_for_bit(models, run_ranks, tmp_path, layout):
    ranks, sizes = LAYOUTS[layout]
    teacher, cached = f"distill.teacher={models[1]}", f"distill.cache={tmp_path / 'cache'}"
    live = run_ranks(ranks, train_curve, run_of(models, tmp_path / "live", teacher, *sizes))[0]
    made = run_ranks(ranks, train_curve, run_of(models, tmp_path / "made", teacher, cached, *sizes))[0]
    read = run_ranks(ranks, without_teacher, run_of(models, tmp_path / "read", teacher, cached, *sizes))[0]
    assert torch.equal(losses(made), losses(live))
    assert torch.equal(losses(read), losses(live))
    trained = [whole_tensors(tmp_path / name / "checkpoints" / "step_00000003") for name in ("live", "made", "read")]
    assert differences(trained[0], trained[1]) == []
    assert differences(trained[0], trained[2]) == []


def curve_and_passes(rank, world_size, overrides):
    """The curve, and of each pass of the teacher how many sequences its parts had."""
    seen = []

    def noted(model, tokens):
        seen.append(tuple(map(len, tokens)))
        return forward_hidden(model, tokens)

    with patch("megaqad.distillation.teachers.forward_hidden", noted):
        rows = train_curve(rank, world_size, [*overrides, "evaluation.every=0"])
    return rows, seen


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(1, []), (2, ["parallel.tensor=2", "parallel.sequence=true"]), (2, ["parallel.pipeline=2"])]
)
def test_microbatches_go_through_the_teacher_together(models, run_ranks, tmp_path, ranks, sizes):
    """Eight sequences in microbatches of two: all at once, or in two parts where there are two stages."""
    options = [f"distill.teacher={models[1]}", "quantization=none", *sizes]
    plain = run_ranks(ranks, train_curve, run_of(models, tmp_path / "plain", *options))[0]
    options.append("train.teacher_micro_batch_size=8")
    found, sizes_seen = run_ranks(ranks, curve_and_passes, run_of(models, tmp_path / "together", *options))[0]
    assert losses(found).tolist() == pytest.approx(losses(plain).tolist(), rel=1e-6)
    assert set(sizes_seen) == ({(4,) * 2} if "parallel.pipeline=2" in sizes else {(8,)})


OTHER_LAYOUTS = {
    "written by one rank, read by pipeline 2 x data 2, interleaved": (
        (1, []),
        (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.data=2"]),
    ),
    "written by tensor 2, read by tensor 2 x pipeline 2, sequence": (
        (2, ["parallel.tensor=2"]),
        (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    ),
}


@pytest.mark.parametrize("layouts", OTHER_LAYOUTS)
def test_bit_for_bit_in_another_layout_than_it_was_written_in(models, run_ranks, tmp_path, layouts):
    """Of one tensor-parallel size: another divides the teacher's sums, live as in the cache."""
    (writers, writing), (readers, reading) = OTHER_LAYOUTS[layouts]
    teacher, cached = f"distill.teacher={models[1]}", f"distill.cache={tmp_path / 'cache'}"
    run_ranks(writers, train_curve, run_of(models, tmp_path / "made", teacher, cached, *writing))
    live = run_ranks(readers, train_curve, run_of(models, tmp_path / "live", teacher, *reading))[0]
    read = run_ranks(readers, without_teacher, run_of(models, tmp_path / "read", teacher, cached, *reading))[0]
    assert torch.equal(losses(read), losses(live))
    trained = [whole_tensors(tmp_path / name / "checkpoints" / "step_00000003") for name in ("live", "read")]
    assert differences(*trained) == []


def test_a_cache_fits_every_layout_and_mends_itself(models, run_ranks, tmp_path):
    options = ["quantization=none", f"distill.teacher={models[1]}", f"distill.cache={tmp_path / 'cache'}"]
    expected = run_ranks(1, train_curve, run_of(models, tmp_path / "one", *options))[0]
    assert not list(tmp_path.glob("cache/*/.*")), "no file half written"
    ranks, sizes = LAYOUTS["tensor 2, sequence, pipeline 2, interleaved"]
    overrides = [*options, *sizes, "train.micro_batch_size=1"]
    found = run_ranks(ranks, without_teacher, run_of(models, tmp_path / "four", *overrides))[0]
    assert losses(found).tolist() == pytest.approx(losses(expected).tolist(), rel=1e-4)
    first, second, *_ = sorted(tmp_path.glob("cache/*/*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    again = run_ranks(1, train_curve, run_of(models, tmp_path / "again", *options))[0]
    assert torch.equal(losses(again), losses(expected))
    assert first.read_bytes() == content
    second.write_bytes(second.read_bytes()[:-1])
    message = run_ranks(1, distill, [*SMALL_RUN, *run_of(models, tmp_path / "damaged", *options)])[0]
    assert f"{second} of distill.cache is damaged" in message
    assert "\n" not in message


def test_the_original_model_cached_in_the_run(models, run_ranks, tmp_path):
    """Quantized, so that there is something to learn from the original; a second start goes on from the cache."""
    options = ["quantization=nvfp4", "data.max_train_tokens=257"]
    live = run_ranks(1, train_curve, run_of(models, tmp_path / "live", *options))[0]
    first = run_of(models, tmp_path / "run", *options, "distill.teacher=cached", "checkpoint.every=1")
    assert run_ranks(1, distill, [*SMALL_RUN, *first]) == [None]
    assert len(list((tmp_path / "run" / "teacher_cache").glob("*/*.safetensors"))) == 8
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", ignore_errors=True)
    assert run_ranks(1, without_teacher, [*SMALL_RUN, *first], distill) == [None]
    assert torch.equal(losses(read_metrics(tmp_path / "run" / "metrics.jsonl")), losses(live))


def test_a_cache_of_something_else_is_refused(models, run_ranks, tmp_path):
    options = ["quantization=none", "train.steps=1", f"distill.cache={tmp_path / 'cache'}"]
    assert run_ranks(1, distill, [*SMALL_RUN, *run_of(models, tmp_path / "one", *options)])[0] is None
    renamed = shutil.copytree(models[0], tmp_path / "renamed")
    (renamed / "tokenizer.json").write_text("{}")  # the same weights, read as other words
    for name, change, said in (
        ("tokenizer", f"model={renamed}", "another tokenizer (its files differ)"),
        ("data", "data.max_train_tokens=290", "other data (the training tokens differ)"),
        ("teacher", f"distill.teacher={models[1]}", "another teacher"),
        ("length", "train.sequence_length=16", "sequence_length=32, this run has 16"),
        ("dtype", "runtime.dtype=bfloat16", "dtype=float32, this run has bfloat16"),
        ("place", f"distill.cache={models[0]}", "is not empty and holds no teacher_cache.json"),
    ):
        overrides = [*SMALL_RUN, *run_of(models, tmp_path / name, *options, change)]
        messages = run_ranks(2, distill, overrides)
        assert messages[0] == messages[1]
        assert said in messages[0]
        assert "\n" not in messages[0]


def self_teacher(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    """What a student that is its own teacher gets wrong when it has been trained already."""
    session = Session.start(load_settings([*SMALL_RUN, *overrides]))
    try:
        student = session.calibrated_student()
        freeze(student, session.settings.train.trainable)
        wrap_for_training(student)  # moves what is trained into a buffer
        trained = [one for chunk in student.chunks for one in chunk.parameters() if one.requires_grad]
        shift(trained)
        student.changed()
        teacher = SelfTeacher(student, original_values(student, session.settings.model_dir))
        before = [(one.data_ptr(), one.detach().clone()) for one in trained]
        wrong = list(wrong_passes(session, student, teacher))
        after = [(one.data_ptr(), one.detach()) for one in trained]
        if any(was != now or not torch.equal(old, new) for (was, old), (now, new) in zip(before, after, strict=True)):
            wrong.append("the trained weights are not put back where they were")
        if any(site.mode is not QuantizerMode.ON for site in sites(student)):
            wrong.append("its quantizers stay off")
        if session.ranks.is_last_stage:
            wrong += wrong_heads(session, student, teacher)
        return wrong
    finally:
        shutdown_parallel()


@torch.no_grad()
def shift(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.add_(0.1)


def wrong_passes(session: Session, student: Model, teacher: SelfTeacher) -> Iterator[str]:
    """Its pass against the original's; then one that ends in the middle."""
    tokens = [torch.arange(32).view(2, 16)] * 2
    student_alone = forward_hidden(student, tokens)
    own, original = teacher.last_hidden(tokens), forward_hidden(session.teacher, tokens)
    for ours, theirs, quantized in zip(own, original, student_alone, strict=True):
        if not torch.equal(ours, theirs) or torch.equal(ours, quantized):
            yield "its hidden states are not the original's"
    if not all(map(torch.equal, student_alone, forward_hidden(student, tokens))):
        yield "the student is another after its pass"
    try:
        teacher.last_hidden([torch.arange(16)])  # not [b, s]: refused on every rank, before anything is sent
        yield "one-dimensional tokens pass"
    except ValueError:
        pass


def wrong_heads(session: Session, student: Model, teacher: SelfTeacher) -> Iterator[str]:
    """The head that it hands out has to last until the losses of the student's pass are computed."""
    head, parameter = teacher.head_weight(), student.last.output_layer.weight
    if (head.data_ptr() == parameter.data_ptr()) == parameter.requires_grad:
        yield "a frozen head is a copy, or a trained one is the student's"
    if parameter.requires_grad:
        shift([parameter])
    if head.requires_grad or not torch.equal(head, session.teacher.last.head_weight()):
        yield "its head is not the original's"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (
            1,
            [
                "quantization=nvfp4_kv_fp8",
                "quantization.exclude=[]",
                "train.trainable=[model.embed_tokens,lm_head,'model.layers.[13].*']",
            ],
        ),
        (2, ["parallel.pipeline=2", "train.trainable=['model.layers.[23].mlp.*']"]),  # none on the first stage
    ],
)
def test_a_student_that_is_its_own_teacher(models, run_ranks, tmp_path, ranks, options):
    assert run_ranks(ranks, self_teacher, run_of(models, tmp_path, *options)) == [[]] * ranks


def distill_with_a_nan(rank: int, world_size: int, arguments: list[str], teacher: str) -> str | None:
    with patch("megaqad.recovery.session.load_weights", spoiled_embedding(load_weights, teacher, token=300)):
        return distill(rank, world_size, arguments)


@pytest.mark.parametrize("sizes", [["parallel.pipeline=2"], ["parallel.tensor=2", "parallel.sequence=true"]])
def test_nan_of_the_teacher_is_named(models, run_ranks, tmp_path, sizes):
    """One token's, in some sequence from some position on."""
    overrides = run_of(models, tmp_path / "run", f"distill.teacher={models[1]}", "quantization=none", *sizes)
    arguments = [*SMALL_RUN, *overrides, "data.max_train_tokens=4000"]
    messages = run_ranks(2, distill_with_a_nan, arguments, str(models[1]))
    assert messages[0] == messages[1]
    for words in ("teacher's logits are not finite: microbatch", "of step", "rank", "sequence", "tokens"):
        assert words in messages[0]
    assert "\n" not in messages[0]
