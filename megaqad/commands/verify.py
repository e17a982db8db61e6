"""``megaqad verify``: read the export back as a client would and compare it with the student, in ``verify.json``."""

import torch
import torch.distributed as dist

from megaqad.commands.logits import gathered_logits
from megaqad.commands.session import Session
from megaqad.commands.students import load_student
from megaqad.config import Settings
from megaqad.data import read_token_file
from megaqad.errors import UserError
from megaqad.export.reference import student_reference
from megaqad.export.verify import Verification
from megaqad.export.verify import verify as verify_export
from megaqad.models.model import Model

SEQUENCES, LENGTH = 4, 128
"""Tokens compared when the user gives none: enough for every layer and scale to show in the logits."""


def verify(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    compare_export(session, load_student(session))


def compare_export(session: Session, student: Model) -> Verification | None:
    """Run the student and the export on the same tokens; the main rank returns what was found.

    Collectives: a forward pass of the student, its logits to the main rank, one broadcast of the outcome.

    Raises:
        UserError: the export is damaged or computes something else; on every rank.
    """
    settings = session.settings
    given = settings.tokens
    tokens = read_token_file(given, session.architecture.vocab_size) if given else _some_tokens(session)
    reference = student_reference(
        student,
        session.plan,
        lambda model: gathered_logits(session, model, tokens),
    )
    result: Verification | None = None
    problem: list[str | None] = [None]
    if session.ranks.is_main:
        assert reference is not None
        try:
            result = verify_export(
                settings.run_dir / "export",
                tokens=tokens.numpy(),
                reference_logits=reference.reference_logits,
                weight_only_logits=reference.weight_only_logits,
                input_amax=reference.input_amax,
                cache_amax=reference.cache_amax,
                report=settings.run_dir / "verify.json",
            )
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])
    if result is not None:
        session.terminal.say(
            f"verified: {result.tensors} tensors intact; transformers computes the student's logits over "
            f"{result.tokens} tokens, relative error {result.relative_error:.1e}, KL {result.kl_to_student:.1e}"
        )
    return result


def _some_tokens(session: Session) -> torch.Tensor:
    """int64 [4, 128] random ids: a function is compared, not a text."""
    length = min(LENGTH, session.architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(session.settings.seed)
    return torch.randint(0, session.architecture.vocab_size, (SEQUENCES, length), generator=generator)
