"""Numbers of a teacher that are none: the step, the rank, the microbatch, the sequence and the tokens are named."""

import pytest
import torch

from megaqad.config import load_settings
from megaqad.data.batch import Batch
from megaqad.distillation.finite import TeacherFault, explain_teacher
from megaqad.distillation.teachers import LiveTeacher
from megaqad.errors import UserError
from megaqad.recovery.session import Session
from megaqad.runtime.ranks import shutdown_parallel
from tests.distillation.runs import SMALL_RUN, qad_step
from tests.models.checkpoints import make_checkpoint

LAYOUTS = {
    "one": (1, [], torch.nan, "rank 0, sequence 1, tokens 6 to 9"),
    "pipeline": (2, ["parallel.pipeline=2"], torch.inf, "rank 1, sequence 1, tokens 6 to 9"),
    # of 16 tokens, rank 0 holds the first 8
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"], torch.nan, "rank 0, sequence 1, tokens 6 to 9"),
}


class BrokenTeacher(LiveTeacher):
    """Gives numbers that are none in the second microbatch of its second step."""

    def __init__(self, model, value: float) -> None:
        super().__init__(model)
        self.value, self.calls = value, 0

    def last_hidden(self, tokens):
        hidden = super().last_hidden(tokens)
        self.calls += 1
        if self.calls == 2 and hidden:
            length = hidden[1].shape[0]
            ranks = self.model.ranks
            first = ranks.tensor_rank * length if ranks.sizes.sequence else 0
            for position in (2, 6, 7, 9):
                if first <= position < first + length:
                    hidden[1][position - first, 1, 3] = self.value
        return hidden


def messages(rank: int, world_size: int, overrides: list[str], value: float, counts: bool) -> tuple[str | None, bool]:
    """What the second of two steps refuses with, and whether the weights are still those after the first."""
    settings = load_settings([*SMALL_RUN, "quantization=none", "train.warmup_steps=0", *overrides])
    session = Session.start(settings)
    try:
        student = session.original_student()
        step = qad_step(session, student, BrokenTeacher(session.frozen(settings.teacher_dir), value))
        tokens = torch.randint(515, (2, 2, 17), generator=torch.Generator().manual_seed(1))
        weights = torch.ones(2, 2, 16)
        weights[1, 1, 2] = 0
        if not counts:
            weights[1, 1] = 0
        given = [Batch(row[:, :-1], row[:, 1:], weight) for row, weight in zip(tokens, weights, strict=True)]
        assert step(given).fault is None
        before = [one.detach().clone() for chunk in student.chunks for one in chunk.parameters()]
        said = None
        try:
            assert step(given).fault is None
        except UserError as error:
            said = str(error)
        after = [one for chunk in student.chunks for one in chunk.parameters()]
        return said, all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    finally:
        shutdown_parallel()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student, teacher = make_checkpoint("llama", folder / "student"), make_checkpoint("llama", folder / "other", seed=5)
    return [f"model={student}", f"distill.teacher={teacher}", f"output_dir={folder / 'run'}"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_is_named_on_every_rank(run_ranks, arguments, layout):
    ranks, sizes, value, place = LAYOUTS[layout]
    expected = f"the teacher's logits are not finite: microbatch 1 of step 2, {place}: "
    for said, kept in run_ranks(ranks, messages, [*arguments, *sizes], value, True):
        assert said.startswith(expected)
        assert "\n" not in said
        assert kept


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        # The second rank's part of the first replica goes wrong in an earlier sequence than the first rank's.
        (
            [TeacherFault(0, 0, (1, 0), (3, 5)), TeacherFault(1, 0, (0, 2), (8, 9)), TeacherFault(2, 1, (0, 0))],
            "microbatch 0 of step 7, rank 1, sequence 2, tokens 8 to 9: ",
        ),
        # Both parts of one sequence, and another replica's.
        (
            [
                TeacherFault(2, 1, (0, 1), (4, 7)),
                TeacherFault(3, 1, (0, 1), (8, 8)),
                TeacherFault(5, 2, (0, 1), (0, 9)),
            ],
            "microbatch 0 of step 7, rank 2, sequence 1, tokens 4 to 8: ",
        ),
    ],
)
def test_a_sequence_is_named_over_the_ranks_that_hold_its_parts(faults, said):
    assert explain_teacher(faults, step=7).startswith(f"the teacher's logits are not finite: {said}")


def test_ignored_tokens_may_be_anything(run_ranks, arguments):
    [(said, kept)] = run_ranks(1, messages, arguments, torch.nan, False)
    assert said is None
    assert not kept
