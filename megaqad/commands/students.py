"""The stages that several commands run: post-training quantization, training, saving and loading a student."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from megaqad.commands.session import Session
from megaqad.config import Settings
from megaqad.distillation.step import DistillationStep, Objective
from megaqad.evaluation import Evaluation, Evaluator
from megaqad.identity import identity_of
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.state import refresh_weights, round_to_export_dtype, set_mode
from megaqad.training.checkpoint import (
    CheckpointState,
    latest_checkpoint,
    load_checkpoint,
    mark_latest,
    save_checkpoint,
    step_directory,
)
from megaqad.training.logs import MetricsLog
from megaqad.training.loop import Loop
from megaqad.training.optimizer import build_optimizer, wrap_for_training


def write_json(path: Path, content: object, session: Session) -> None:
    """Main rank: write a JSON file whole or not at all."""
    if session.context.is_main:
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.rename(path)


def measure(session: Session, title: str, evaluator: Evaluator, student: list[CausalLM]) -> Evaluation:
    """Evaluate under a progress bar."""
    with session.terminal.progress(f"evaluate {title}", evaluator.groups_of_batches) as progress:
        return evaluator.evaluate(student, lambda: progress.update(progress.task_ids[0], advance=1))


def ptq_student(session: Session) -> list[CausalLM]:
    """The calibrated student: from ``ptq/`` when this run has calibrated already, else calibrated and saved there."""
    directory = session.settings.run_dir / "ptq"
    if (directory / "state.json").is_file():
        return session.student_from(directory)
    session.terminal.say(f"calibrating on {session.settings.quantization.calibration_samples} training sequences")
    student = session.calibrated_student()
    state = CheckpointState(step=0, consumed_samples=0, fingerprint=fingerprint(session), scheduler={})
    save_checkpoint(directory, student, session.context, state)
    return student


def fingerprint(session: Session) -> dict[str, str]:
    """What a checkpoint must agree with to be continued."""
    identity = identity_of("distill", session.settings)
    return {key: str(value) for key, value in identity.items()} | {"data.tokens": session.data.train.fingerprint()}


def train_student(session: Session, run_dir: Path, objective: Objective) -> list[CausalLM]:
    """Train from the calibrated student, or go on from the newest checkpoint in ``run_dir``; the trained student.

    Its weights are rounded to the export dtype, so that what is evaluated is what is shipped.
    """
    settings = session.settings
    newest = latest_checkpoint(run_dir)
    student = ptq_student(session)
    wrapped = wrap_for_training(student)
    optimizer, scheduler = build_optimizer(wrapped, settings.train, session.dtype)
    first_step = consumed = 0
    if newest is not None:
        state = load_checkpoint(newest, student, session.context, optimizer, scheduler)
        first_step, consumed = state.step, state.consumed_samples
        session.terminal.say(f"going on from {newest}, step {first_step}")
        refresh_weights(student, session.context)
    evaluator = session.evaluator(settings.evaluation.training_tokens)

    def validate() -> dict[str, float]:
        numbers = evaluator.evaluate(student)
        return {"kl_to_teacher": numbers.kl_to_teacher, "cross_entropy": numbers.cross_entropy}

    def save(step: int, consumed_samples: int) -> None:
        directory = step_directory(run_dir, step)
        state = CheckpointState(
            step=step,
            consumed_samples=consumed_samples,
            fingerprint=fingerprint(session),
            scheduler=scheduler.state_dict(),
        )
        save_checkpoint(directory, student, session.context, state, optimizer)
        mark_latest(run_dir, directory, settings.checkpoint.keep, session.context)

    log = MetricsLog(run_dir, settings, is_main=session.context.is_main, keep_steps=first_step)
    Loop(
        step=DistillationStep(
            wrapped,
            optimizer,
            scheduler,
            session.context,
            objective=objective,
            teacher=session.teacher if objective is Objective.QAD else None,
            temperature=settings.distill.temperature,
        ),
        data=session.data.train,
        settings=settings.train,
        log=log,
        terminal=session.terminal,
        title=objective.value.upper(),
        save=save,
        save_every=settings.checkpoint.every,
        validate=validate,
        validate_every=settings.evaluation.every,
    ).run(first_step, consumed)
    log.close()
    return ready_to_ship(session, student)


def ready_to_ship(session: Session, student: list[CausalLM]) -> list[CausalLM]:
    """The student with its weights as the export will hold them, quantizers on."""
    round_to_export_dtype(student)
    refresh_weights(student, session.context)
    set_mode(student, QuantizerMode.ON)
    for chunk in student:
        chunk.eval()
    return student


def load_student(session: Session) -> list[CausalLM]:
    """The student that ``student=`` names, ready to ship; the teacher's weights when nothing is quantized."""
    if not session.recipe.enabled and session.settings.student == "auto":
        return session.teacher
    return ready_to_ship(session, session.student_from(session.chosen_student()))


def with_objective(settings: Settings, objective: Objective) -> Settings:
    """The same settings for a run with another objective."""
    return replace(settings, distill=replace(settings.distill, objective=objective.value))


def as_column(evaluation: Evaluation) -> dict[str, float]:
    """One column of ``recovery.json``."""
    numbers = asdict(evaluation)
    return {key: numbers[key] for key in ("kl_to_teacher", "cross_entropy", "top1_agreement", "tokens")}
