"""What the stages are made of: the post-training-quantized student, loading one, measuring one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaqad.evaluation import Evaluation, Evaluator
from megaqad.models.model import Model
from megaqad.quantization.choice import has_choice, read_choice, write_choice
from megaqad.quantization.model import round_to_export_dtype, switch
from megaqad.quantization.site import QuantizerMode
from megaqad.recovery.sensitivity import choose_formats
from megaqad.recovery.session import Session
from megaqad.runtime.agree import on_main
from megaqad.runtime.files import write_text_whole
from megaqad.training.checkpoint import STATE_FILE, CheckpointState, damage, layout_of, read_state
from megaqad.training.position import Position
from megaqad.training.saver import CheckpointSaver, remove_leftovers

NOT_OF_CALIBRATION = ("train.", "distill.", "kind")
"""Of a run's identity: what its calibrated student does not depend on."""


def write_json(path: Path, content: object, session: Session) -> None:
    """Main rank: write a JSON file whole or not at all, in a directory that is made when missing."""
    if session.ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def measure(session: Session, title: str, evaluator: Evaluator, student: Model) -> Evaluation:
    """Evaluate under a progress bar."""
    with session.terminal.progress(f"evaluate {title}", evaluator.groups_of_batches) as progress:
        return evaluator.evaluate(student, lambda: progress.update(progress.task_ids[0], advance=1))


def settle_recipe(session: Session) -> None:
    """Under ``quantization.auto``: choose the layers' formats, unless this run has chosen already, and record them."""
    settings = session.settings
    target = settings.quantization.target_bits
    if target is None or on_main(
        lambda: has_choice(settings.run_dir) and read_choice(settings.run_dir).target_bits == target
    ):
        return
    recipe = session.plan_of_settings()
    session.terminal.say(f"measuring each layer to choose an average of {target:g} bits")
    student = ready_to_ship(session, session.calibrated_student(recipe))
    choice = choose_formats(session, student, session.evaluator(settings.evaluation.training_tokens))
    on_main(lambda: write_choice(settings.run_dir, choice, settings.quantization))


def ptq_student(session: Session) -> Model:
    """The calibrated student: from ``ptq/`` when this run has calibrated already, else calibrated and saved there."""
    settle_recipe(session)
    directory = session.settings.run_dir / "ptq"
    facts = session.identity
    if on_main(lambda: _is_calibration_of(directory, facts)):
        problem = damage(directory, session.ranks, with_training=False)
        if problem is None:
            return session.student_from(directory)
        session.terminal.say(f"ptq is damaged and made again: {problem}")
    if session.plan.needs_data:
        session.terminal.say(f"calibrating on {session.calibration_samples} training sequences")
    elif session.plan.enabled:
        session.terminal.say("calibrating without data: no scale of this recipe comes from them")
    student = session.calibrated_student()
    on_main(lambda: remove_leftovers(session.settings.run_dir))
    saver = CheckpointSaver(session.ranks)
    saver.start(directory, student, CheckpointState(Position(), facts, layout_of(session.ranks)))
    saver.finish()
    return student


def _is_calibration_of(directory: Path, facts: dict[str, Any]) -> bool:
    """Whether ``ptq/`` is there and was calibrated for this model, recipe and data."""
    if not (directory / STATE_FILE).is_file():
        return False
    recorded = read_state(directory).fingerprint
    return all(recorded.get(key) == value for key, value in facts.items() if not key.startswith(NOT_OF_CALIBRATION))


def ready_to_ship(session: Session, student: Model) -> Model:
    """The student with its weights as the export will hold them, quantizers on."""
    switch(student.train(False), QuantizerMode.ON)
    round_to_export_dtype(student)
    return student


def load_student(session: Session) -> Model:
    """The student that ``student=`` names, ready to ship; the teacher's weights when nothing is quantized."""
    if not session.plan.enabled and session.settings.student == "auto":
        return session.teacher
    return ready_to_ship(session, session.student_from(session.chosen_student()))


def as_column(evaluation: Evaluation) -> dict[str, float]:
    """One column of ``recovery.json``."""
    numbers = asdict(evaluation)
    return {key: numbers[key] for key in ("kl_to_teacher", "cross_entropy", "top1_agreement", "tokens")}
