"""``megaqad evaluate``: held-out numbers of a student, in ``evaluation.json``."""

from dataclasses import asdict

from megaqad.commands.session import Session
from megaqad.commands.students import load_student, measure, write_json
from megaqad.config import Settings


def evaluate(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    student = load_student(session)
    numbers = measure(session, settings.student, session.evaluator(settings.evaluation.max_tokens), student)
    if session.ranks.is_main:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings.run_dir / "evaluation.json", asdict(numbers), session)
    session.terminal.say(
        f"KL to the teacher {numbers.kl_to_teacher:.5f}, cross entropy {numbers.cross_entropy:.4f} "
        f"(teacher {numbers.teacher_cross_entropy:.4f}), top-1 agreement {numbers.top1_agreement:.2%}, "
        f"{numbers.tokens:,} tokens"
    )
