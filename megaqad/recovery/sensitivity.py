"""What each layer group costs when quantized alone, and the choice that ``quantization.auto`` makes from it."""

from collections.abc import Sequence

from megaqad.evaluation import Evaluator
from megaqad.models.model import Model
from megaqad.quantization.allocation import BF16, GroupKL, average_bits, choose, predicted_kl
from megaqad.quantization.choice import Choice
from megaqad.quantization.plan import QuantizationPlan
from megaqad.quantization.sensitivity import measure_groups, quantize_only, quantized_groups, use_formats
from megaqad.recovery.session import Session


def group_kls(
    session: Session, student: Model, plan: QuantizationPlan, evaluator: Evaluator, others: Sequence[str] = ()
) -> list[GroupKL]:
    """KL of every group that ``plan`` quantizes, alone, and the same in the formats ``others``; ``student`` is
    calibrated by it and ready to ship."""
    groups = quantized_groups(plan, session.architecture)
    with session.terminal.progress("each layer alone", len(groups) * (1 + len(others))) as progress:

        def measure() -> float:
            kl = evaluator.evaluate(student).kl_to_teacher
            progress.update(progress.task_ids[0], advance=1)
            return kl

        return measure_groups(student, groups, measure, plan=plan, others=others)


def choose_formats(session: Session, student: Model, evaluator: Evaluator) -> Choice:
    """Measure the groups in every candidate format, choose, and measure the choice on the same tokens.

    Args:
        student: calibrated by the recipe of the settings, with nothing chosen yet, and ready to ship.

    Collectives: one evaluation per group and format and one more.
    """
    quantization = session.settings.quantization
    target = quantization.target_bits
    assert target is not None, "only under quantization.auto"
    plan = session.plan_of_settings()
    groups = group_kls(session, student, plan, evaluator, quantization.auto_formats)
    chosen = choose(groups, target)
    modules = {group.name: group.modules for group in quantized_groups(plan, session.architecture)}
    formats = {module: name for group, name in chosen.items() for module in modules[group]}
    others = {module: known for module, name in formats.items() if (known := plan.named(name)) is not None}
    use_formats(student, others)
    quantize_only(student, {module for module in plan.formats if formats.get(module) != BF16}, caches=True)
    measured = evaluator.evaluate(student)
    choice = Choice(
        target_bits=target,
        average_bits=average_bits(groups, chosen),
        chosen=chosen,
        formats=formats,
        predicted_kl=predicted_kl(groups, chosen),
        measured_kl=measured.kl_to_teacher,
        tokens=measured.tokens,
        groups=tuple(groups),
    )
    session.terminal.say(
        f"quantization.auto: of {len(groups)} layer groups {len(choice.of(BF16))} stay BF16 and "
        f"{len(choice.of('fp8'))} become FP8, {choice.average_bits:.2f} bits per weight; KL to the teacher "
        f"{choice.measured_kl:.5f} over {choice.tokens:,} tokens, {choice.predicted_kl:.5f} predicted from the groups "
        "alone"
    )
    return choice
