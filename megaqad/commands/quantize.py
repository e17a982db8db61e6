"""``megaqad quantize``: calibrate, keep the quantized student in ``ptq/``, measure what it lost."""

from dataclasses import asdict

from megaqad.commands.session import Session
from megaqad.commands.students import measure, ptq_student, ready_to_ship, write_json
from megaqad.config import Settings
from megaqad.evaluation import Evaluation, Evaluator
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.state import quantization_errors


def quantize(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings, command="quantize")
    student = ready_to_ship(session, ptq_student(session))
    gap = measure_gap(session, student, session.evaluator(settings.evaluation.max_tokens))
    session.terminal.say(
        f"PTQ: KL to the teacher {gap.kl_to_teacher:.5f}, cross entropy {gap.cross_entropy:.4f} "
        f"(teacher {gap.teacher_cross_entropy:.4f}), top-1 agreement {gap.top1_agreement:.2%}, {gap.tokens:,} tokens"
    )


def measure_gap(session: Session, student: list[CausalLM], evaluator: Evaluator) -> Evaluation:
    """Evaluate the calibrated student and write ``ptq.json``."""
    gap = measure(session, "PTQ", evaluator, student)
    errors = [asdict(error) for error in quantization_errors(student, session.context)]
    write_json(session.settings.run_dir / "ptq.json", asdict(gap) | {"layers": errors}, session)
    return gap
