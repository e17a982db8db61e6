"""Teachers that cannot teach, on two ranks of the real command: one line that says which and where, exit code 2."""

import re

import pytest

from megaqad.config import load_settings
from megaqad.data import build_datasets
from tests.faults.runs import newest_step
from tests.models.checkpoints import make_checkpoint

BROKEN_TOKEN = 300


def refusal(command) -> str:
    """The one line that a command on two ranks ends with."""
    assert command.wait() == 2, command.output
    said = [line for line in command.output.splitlines() if line.startswith("megaqad: ")]
    assert len(said) == 1, command.output
    assert "Traceback" not in command.output
    return said[0]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A teacher of the same shape with other weights."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("other"), seed=5)


def first_place_of(token: int, arguments: list[str]) -> tuple[int, int, int, int]:
    """Step from 1, microbatch, sequence and position of a token's first use."""
    settings = load_settings(arguments)
    train = settings.train
    data = build_datasets(
        settings.data, model_dir=settings.model_dir, sequence_length=train.sequence_length, seed=settings.seed
    ).train
    for step in range(train.steps):
        batches = data.micro_batches(
            step * train.global_batch_size,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_rank=0,
            data_size=1,
        )
        for index, batch in enumerate(batches):
            found = (batch.tokens == token).nonzero()
            if len(found):
                return step + 1, index, int(found[0, 0]), int(found[0, 1])
    raise AssertionError(f"token {token} is in no sequence")


def test_nan_in_the_teachers_logits(runner, model, other, report, tmp_path):
    """Attention hands it to all later tokens of the sequence; to earlier ones too, where it multiplies it by 0."""
    run_dir, options = tmp_path / "run", [f"distill.teacher={other}", "train.micro_batch_size=2"]
    step, batch, sequence, position = first_place_of(BROKEN_TOKEN, runner.arguments(run_dir, *options)[1:])
    said = refusal(runner.start(run_dir, *options, faults=[("nan_in_teacher", str(other), BROKEN_TOKEN)]))
    assert "the teacher's logits are not finite" in said
    assert f"microbatch {batch} of step {step}, rank 0, sequence {sequence}, tokens " in said
    first, last = re.search(r"tokens (\d+) to (\d+)", said).groups()
    assert int(first) <= position
    assert int(last) == 31
    assert newest_step(run_dir) <= step - 1, "nothing of that step is trained"
    report("NaN in the teacher's logits", "ended with step, rank, sequence and tokens named")


def test_a_cache_for_something_else(runner, other, tmp_path):
    options = ["train.steps=1", "train.warmup_steps=0", f"distill.cache={tmp_path / 'cache'}"]
    runner.finish(tmp_path / "made", *options)
    for name, change, words in (
        ("data", "data.max_train_tokens=19000", "other data (the training tokens differ)"),
        ("teacher", f"distill.teacher={other}", "another teacher (its weights differ)"),
    ):
        said = refusal(runner.start(tmp_path / name, *options, change))
        assert f"distill.cache={tmp_path / 'cache'} was made for {words}: give another directory" in said
