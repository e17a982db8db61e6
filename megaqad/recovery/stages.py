"""The stages of a recovery, each a function of a session and a student; the commands are shells around them."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megaqad.data import read_token_file
from megaqad.distillation.step import DistillationStep, Objective
from megaqad.evaluation import Evaluation, Evaluator
from megaqad.export.checkpoint import export_checkpoint
from megaqad.export.reference import student_reference
from megaqad.export.verify import Verification, arithmetic
from megaqad.export.verify import verify as verify_export
from megaqad.models.model import Model
from megaqad.quantization.allocation import GroupKL
from megaqad.quantization.choice import read_choice
from megaqad.quantization.model import quantization_errors
from megaqad.quantization.settings import SCALE_LR
from megaqad.recovery.logits import gathered_logits
from megaqad.recovery.sensitivity import group_kls
from megaqad.recovery.session import Session
from megaqad.recovery.students import as_column, measure, ptq_student, ready_to_ship, write_json
from megaqad.recovery.teaching import divergence_of, hidden_loss_of, teacher_of
from megaqad.report import COLUMNS_FILE, draw_sensitivity
from megaqad.runtime.agree import on_main_for_long
from megaqad.runtime.files import write_bytes_whole
from megaqad.training.freezing import balance_experts, freeze
from megaqad.training.optimizer import build_optimizer, wrap_for_training
from megaqad.training.run import TrainingRun

MOST_NAMED = 3
"""Groups named on the terminal; all are in ``ptq.json``."""
SEQUENCES, LENGTH = 4, 128
"""Tokens compared when the user gives none: enough for every layer and scale to show in the logits."""


def quantize(session: Session) -> Model:
    """The post-training-quantized student: of ``ptq/`` where this run has calibrated already, else made and saved
    there. Collective."""
    return ready_to_ship(session, ptq_student(session))


def distill(session: Session, *, objective: Objective | None = None, run_dir: Path | None = None) -> Model:
    """Train from the quantized student, or go on from the newest checkpoint; the trained student, its weights as they
    ship, so that what is evaluated is what is exported. Collective.

    Args:
        objective: None: ``distill.objective``.
        run_dir: where checkpoints and ``metrics.jsonl`` go; None: ``output_dir``.

    Raises:
        StoppedEarly: by a signal or ``train.stop_after``; all is saved.
    """
    settings = session.settings
    objective = objective or Objective(settings.distill.objective)
    run_dir = run_dir or settings.run_dir
    student = ptq_student(session)
    freeze(student, settings.train.trainable, routers=settings.train.router == "trained")
    balance_experts(student, settings.train.router_balance)
    wrapped = wrap_for_training(student)
    optimizer, scheduler = build_optimizer(
        wrapped,
        settings.train,
        session.dtype,
        scale_lr=settings.quantization.scale_lr or SCALE_LR,
        fused=settings.runtime.fused,
    )
    teaches = objective is Objective.QAD and settings.distill.qad_needs_teacher
    teacher = teacher_of(session, student) if teaches else None
    itself = teacher if settings.distill.teacher == "self" else None
    evaluators: list[Evaluator] = []  # made on first use: it may load the original model, which other teachers need not

    def validate(advance: Callable[[], None]) -> dict[str, float]:
        if not evaluators:
            evaluators.append(session.evaluator(settings.evaluation.training_tokens, itself))
        numbers = evaluators[0].evaluate(student, advance)
        return {"kl_to_teacher": numbers.kl_to_teacher, "cross_entropy": numbers.cross_entropy}

    TrainingRun(
        run_dir=run_dir,
        settings=settings,
        terminal=session.terminal,
        title=objective.value.upper(),
        model=student,
        step=DistillationStep(
            student,
            wrapped,
            optimizer,
            scheduler,
            objective=objective,
            teacher=teacher,
            divergence=divergence_of(session),
            hidden=hidden_loss_of(session, student, teacher.model) if teacher is not None else None,
        ),
        data=session.data.train,
        fingerprint=session.identity | {"distill.objective": objective.value},
        validate=validate,
    ).run()
    return ready_to_ship(session, student)


def evaluate(session: Session, student: Model) -> Evaluation:
    """Held-out numbers of a student against the original model, on every rank; in ``evaluation.json``. Collective."""
    numbers = measure(session, "student", session.evaluator(session.settings.evaluation.max_tokens), student)
    write_json(session.settings.run_dir / "evaluation.json", asdict(numbers), session)
    return numbers


def export(session: Session, student: Model) -> Path:
    """Write ``export/`` from any layout, replacing this run's earlier one once the new one is complete; its directory.
    Collective."""
    target = session.settings.run_dir / "export"
    plan, settings = session.plan, session.settings
    carried = export_checkpoint(student, plan, target, model_dir=settings.model_dir, layout=settings.export.format)
    session.terminal.say(f"exported {len(plan.formats)} quantized layers to {target}")
    if carried:
        more = f" and {len(carried) - 1} more tensors" if len(carried) > 1 else ""
        session.terminal.say(f"carried over unchanged, since this model does not compute with them: {carried[0]}{more}")
    if settings.export.format == "modelopt" and any(chosen.dynamic for chosen in plan.formats.values()):
        session.terminal.say(
            "it holds no input scales: TensorRT-LLM takes them from the inputs; vLLM and SGLang need "
            "quantization.activation_scales=static"
        )
    return target


def verify(session: Session, student: Model) -> Verification | None:
    """Run the student and the export on the same tokens; what was found, on every rank, None under verify.model=off.

    The rest of it, reader by reader, is in ``verify.json``.

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


def recover(session: Session, *, command: list[str]) -> Model:
    """The whole journey on the same ranks; the QAD student. What was measured is in ``columns.json``. Collective.

        calibrate -> measure the PTQ gap -> [train a QAT student] -> distil -> evaluate -> export -> verify

    Started again after an interruption it resumes from the newest checkpoint; what was measured is measured again.

    Args:
        command: what the report shows as the way to get it again.

    Raises:
        UserError, StoppedEarly: as the stages.
    """
    started = time.monotonic()
    evaluator = session.evaluator(session.settings.evaluation.max_tokens)
    columns = {"bf16": as_column(measure(session, "BF16", evaluator, session.teacher))}
    columns["ptq"] = as_column(measure_gap(session, quantize(session), evaluator))
    if session.settings.report.compare_qat:
        beside = session.settings.run_dir / "qat"
        if session.ranks.is_main:
            beside.mkdir(exist_ok=True)
        dist.barrier()
        qat = distill(session, objective=Objective.QAT, run_dir=beside)
        columns["qat"] = as_column(measure(session, "QAT", evaluator, qat))
    student = distill(session, objective=Objective.QAD)
    recovered = measure(session, "QAD", evaluator, student)
    columns["qad"] = as_column(recovered)
    write_json(session.settings.run_dir / "evaluation.json", asdict(recovered), session)
    export(session, student)
    verify(session, student)
    found = {"columns": columns, "seconds": time.monotonic() - started, "command": command}
    write_json(session.settings.run_dir / COLUMNS_FILE, found, session)
    return student


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


def _some_tokens(session: Session) -> torch.Tensor:
    """int64 [4, 128] random ids: a function is compared, not a text."""
    length = min(LENGTH, session.architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(session.settings.seed)
    return torch.randint(0, session.architecture.vocab_size, (SEQUENCES, length), generator=generator)
