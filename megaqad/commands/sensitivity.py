"""What each layer group costs when quantized alone, and the choice that ``quantization.auto`` makes from it."""

from megaqad.commands.session import Session
from megaqad.evaluation import Evaluator
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.allocation import GroupKL, average_bits, choose_kept
from megaqad.quantization.choice import Choice
from megaqad.quantization.recipe import Recipe
from megaqad.quantization.sensitivity import measure_groups, quantize_only, quantized_groups


def group_kls(session: Session, student: list[CausalLM], recipe: Recipe, evaluator: Evaluator) -> list[GroupKL]:
    """KL of every group that ``recipe`` quantizes, alone; ``student`` is calibrated by it and ready to ship."""
    groups = quantized_groups(recipe, session.description)
    with session.terminal.progress("each layer alone", len(groups)) as progress:

        def measure() -> float:
            kl = evaluator.evaluate(student).kl_to_teacher
            progress.update(progress.task_ids[0], advance=1)
            return kl

        return measure_groups(student, groups, measure)


def choose_formats(session: Session, student: list[CausalLM], evaluator: Evaluator) -> Choice:
    """Measure the groups, choose which stay BF16, and measure the choice on the same tokens.

    Args:
        student: calibrated by the recipe of the settings, with nothing kept yet, and ready to ship.

    Collectives: one evaluation per group and one more.
    """
    target = session.settings.quantization.target_bits
    assert target is not None, "only under quantization.auto"
    recipe = session.recipe_of_settings()
    groups = group_kls(session, student, recipe, evaluator)
    kept = choose_kept(groups, target)
    modules = {group.name: group.modules for group in quantized_groups(recipe, session.description)}
    left = {name for group in groups if group.group not in kept for name in modules[group.group]}
    quantize_only(student, left, caches=True)
    measured = evaluator.evaluate(student)
    choice = Choice(
        target_bits=target,
        average_bits=average_bits(groups, kept),
        kept=tuple(kept),
        kept_modules=tuple(name for group in kept for name in modules[group]),
        predicted_kl=sum(group.kl_to_teacher for group in groups if group.group not in kept),
        measured_kl=measured.kl_to_teacher,
        tokens=measured.tokens,
        groups=tuple(groups),
    )
    session.terminal.say(
        f"quantization.auto: {len(kept)} of {len(groups)} layer groups stay BF16, {choice.average_bits:.2f} bits per "
        f"weight; KL to the teacher {choice.measured_kl:.5f} over {choice.tokens:,} tokens, {choice.predicted_kl:.5f} "
        "predicted from the groups alone"
    )
    return choice
