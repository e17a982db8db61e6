"""``megaqad quantize``: calibrate, keep the quantized student in ``ptq/``, measure what it lost."""

from dataclasses import asdict

from megaqad.commands.sensitivity import group_kls
from megaqad.commands.session import Session
from megaqad.commands.students import measure, ptq_student, ready_to_ship, write_json
from megaqad.config import Settings
from megaqad.evaluation import Evaluation, Evaluator
from megaqad.models.model import Model
from megaqad.quantization.allocation import GroupKL
from megaqad.quantization.choice import read_choice
from megaqad.quantization.model import quantization_errors
from megaqad.report import draw_sensitivity
from megaqad.runtime.files import write_bytes_whole

MOST_NAMED = 3
"""Groups named on the terminal; all are in ``ptq.json``."""


def quantize(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings, command="quantize")
    student = ready_to_ship(session, ptq_student(session))
    gap = measure_gap(session, student, session.evaluator(settings.evaluation.max_tokens))
    session.terminal.say(
        f"PTQ: KL to the teacher {gap.kl_to_teacher:.5f}, cross entropy {gap.cross_entropy:.4f} "
        f"(teacher {gap.teacher_cross_entropy:.4f}), top-1 agreement {gap.top1_agreement:.2%}, {gap.tokens:,} tokens"
    )


def measure_gap(session: Session, student: Model, evaluator: Evaluator) -> Evaluation:
    """Evaluate the calibrated student and write ``ptq.json``: the gap, and layer by layer what it comes from."""
    settings = session.settings
    gap = measure(session, "PTQ", evaluator, student)
    content = asdict(gap) | {"layers": [asdict(error) for error in quantization_errors(student)]}
    if settings.quantization.auto is not None:
        content["auto"] = asdict(read_choice(settings.run_dir))
        content["sensitivity"] = content["auto"].pop("groups")
    elif settings.report.sensitivity and session.plan.enabled:
        fewer = session.evaluator(settings.evaluation.training_tokens)
        groups = group_kls(session, student, session.plan, fewer)
        content["sensitivity"] = [asdict(group) for group in groups]
        _say_worst(session, groups)
    write_json(settings.run_dir / "ptq.json", content, session)
    if "sensitivity" in content and session.ranks.is_main:
        picture = draw_sensitivity([GroupKL(**group) for group in content["sensitivity"]])
        write_bytes_whole(settings.run_dir / "sensitivity.png", picture.png)
    return gap


def _say_worst(session: Session, groups: list[GroupKL]) -> None:
    worst = sorted(groups, key=lambda group: -group.kl_to_teacher)[:MOST_NAMED]
    named = ", ".join(f"{group.group} {group.kl_to_teacher:.5f}" for group in worst)
    session.terminal.say(f"quantized alone, the most KL comes from {named}")
