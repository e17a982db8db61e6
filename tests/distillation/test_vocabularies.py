"""Teacher and student with different numbers of ids: padded vocabularies, added tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.config.settings import BUNDLED_TEACHER
from megaqad.errors import UserError
from megaqad.models.checks import check_vocabularies
from megaqad.models.families import describe_model
from tests.distillation.runs import SMALL_RUN, train_curve
from tests.models.checkpoints import make_checkpoint
from tests.training.runs import distill, losses

IDS = json.loads((BUNDLED_TEACHER / "config.json").read_text())["vocab_size"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LAYOUTS = [(1, []), (2, ["parallel.tensor=2", "parallel.sequence=true"])]
MORE = 13
"""Odd, so that two ranks cut the two vocabularies at different rows."""


def extended(source: Path, target: Path, more: int) -> Path:
    """The model with further rows in embedding and head, whose logits are the largest where there are any."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + more}))
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = 3 * torch.randn(more, tensors[name].shape[1], generator=torch.Generator().manual_seed(1))
        tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and a teacher with the ids of the demo's tokenizer, and both with more."""
    folder, made = tmp_path_factory.mktemp("models"), []
    for seed, name in enumerate(("student", "teacher")):
        model = make_checkpoint("llama", folder / name, seed=seed, vocab_size=IDS)
        for file in TOKENIZER:
            shutil.copy(BUNDLED_TEACHER / file, model)
        made += [model, extended(model, folder / f"extended_{name}", MORE)]
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(f"def f{n}(x):\n    return x * {n} + {n * n}" for n in range(400)))
    return f"data={path}"


def run_of(student, teacher, output, *overrides):
    return [f"model={student}", f"distill.teacher={teacher}", f"output_dir={output}", "train.steps=3", *overrides]


@pytest.mark.parametrize(("ranks", "sizes"), LAYOUTS)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_ids_of_one_model_alone_change_nothing(models, text, run_ranks, tmp_path, which, ranks, sizes):
    """Not the head's shards, which are cut at other rows then: so to a rounding, from the cache bit for bit."""
    student, more_student, teacher, more_teacher = models
    pair = (student, more_teacher) if which == "teacher" else (more_student, teacher)
    options = [*sizes, text, "quantization=none"]
    plain = run_ranks(ranks, train_curve, run_of(student, teacher, tmp_path / "plain", *options))[0]
    found = run_ranks(ranks, train_curve, run_of(*pair, tmp_path / "more", *options))[0]
    assert losses(found).tolist() == pytest.approx(losses(plain).tolist(), rel=1e-6)
    if ranks == 1:
        return
    cached = [*options, f"distill.cache={tmp_path / 'cache'}"]
    through_cache = run_ranks(ranks, train_curve, run_of(*pair, tmp_path / "cached", *cached))[0]
    assert torch.equal(losses(through_cache), losses(found))


def test_data_with_ids_that_the_teacher_lacks(models, run_ranks, tmp_path):
    """Random data use every id of the student."""
    _, more_student, teacher, _ = models
    arguments = [*SMALL_RUN, *run_of(more_student, teacher, tmp_path / "run", "quantization=none")]
    [message] = run_ranks(1, distill, arguments)
    assert f"token {IDS + MORE - 1}" in message
    assert f"distill.teacher={teacher} with vocab_size={IDS}" in message


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, None),  # the teacher has a token more
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1}, None),
        ({"a": 0, "<one>": IDS + 3}, {"a": 0, "<other>": IDS + 3}, None),  # among the rows that one model lacks
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, "token 'a' is 1 there and 0 for the student"),
        ({"a": 0, "<one>": 2}, {"a": 0, "<other>": 2}, "id 2 is '<other>' there and '<one>' for the student"),
    ],
)
def test_shared_ids_must_mean_the_same(models, tmp_path, ours, theirs, said):
    student, _, _, teacher = models
    folders = []
    for model, vocabulary in ((student, ours), (teacher, theirs)):
        folders.append(tmp_path / model.name)
        folders[-1].mkdir()
        (folders[-1] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    pair = (describe_model(student), folders[0], describe_model(teacher), folders[1])
    if said is None:
        check_vocabularies(*pair)
        return
    with pytest.raises(UserError, match="has another vocabulary") as refused:
        check_vocabularies(*pair)
    assert said in str(refused.value)
