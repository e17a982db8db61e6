"""``megaqad verify``: read the export back as a client would and compare it with the student, in ``verify.json``."""

import math
from collections.abc import Callable

import torch

from megaqad.commands.logits import gathered_logits
from megaqad.commands.session import Session
from megaqad.commands.students import load_student
from megaqad.config import Settings
from megaqad.data import read_token_file
from megaqad.export.reference import student_reference
from megaqad.export.verify import Verification, arithmetic
from megaqad.export.verify import verify as verify_export
from megaqad.models.model import Model
from megaqad.runtime.agree import on_main_for_long

SEQUENCES, LENGTH = 4, 128
"""Tokens compared when the user gives none: enough for every layer and scale to show in the logits."""


def verify(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    compare_export(session, load_student(session))


def compare_export(session: Session, student: Model) -> Verification | None:
    """Run the student and the export on the same tokens; what was found, on every rank, None under verify.model=off.

    Collectives: forward passes of the student, its logits to the main rank, and while that rank reads the export a
    broadcast every few seconds.

    Raises:
        UserError: the export is damaged or computes something else; on every rank.
    """
    settings, model = session.settings, session.settings.verify.model
    report = settings.run_dir / "verify.json"
    if model == "off":
        if session.ranks.is_main:
            report.unlink(missing_ok=True)  # of an earlier export
        session.terminal.say("the export is not verified: verify.model=off")
        return None
    given = settings.tokens
    tokens = read_token_file(given, session.architecture.vocab_size) if given else _some_tokens(session)
    parameters = sum(math.prod(shape) for shape in session.architecture.tensors.values())
    reference = student_reference(
        student,
        session.plan,
        None if model == "files" else lambda copied: gathered_logits(session, copied, tokens),
        dtype=arithmetic(parameters),
    )

    def read(beat: Callable[[], None]) -> Verification:
        def advance(doing: str, done: int, total: int) -> None:
            tell(doing, done, total)
            beat()

        assert reference is not None
        return verify_export(
            settings.run_dir / "export",
            tokens=tokens.numpy(),
            model=model,
            original=settings.model_dir,
            report=report,
            advance=advance,
            **vars(reference),
        )

    with session.terminal.parts("verify") as tell:
        result = on_main_for_long(read, lambda: tell("on the first rank", 0, 1))
    session.terminal.say(f"verified: {result.summary}")
    return result


def _some_tokens(session: Session) -> torch.Tensor:
    """int64 [4, 128] random ids: a function is compared, not a text."""
    length = min(LENGTH, session.architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(session.settings.seed)
    return torch.randint(0, session.architecture.vocab_size, (SEQUENCES, length), generator=generator)
