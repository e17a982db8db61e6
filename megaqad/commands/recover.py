"""``megaqad recover``: the whole journey in one run, every stage on the same ranks.

    calibrate -> measure the PTQ gap -> [train a QAT student] -> distil -> evaluate -> export -> verify -> report

Started again after an interruption it goes on from the newest checkpoint; what was measured is measured again.
"""

import sys
import time
from dataclasses import asdict

import torch.distributed as dist

from megaqad.commands.export import write_export
from megaqad.commands.quantize import measure_gap
from megaqad.commands.report import COLUMNS_FILE, show_report
from megaqad.commands.session import Session
from megaqad.commands.students import as_column, measure, ptq_student, ready_to_ship, train_student, write_json
from megaqad.commands.verify import compare_export
from megaqad.config import Settings
from megaqad.distillation.step import Objective


def recover(settings: Settings) -> None:
    """Every rank's part of the command."""
    run_recovery(settings, command="recover")


def run_recovery(settings: Settings, *, command: str) -> None:
    """The journey; ``command`` is the name the user called it by."""
    started = time.monotonic()
    session = Session.start(settings, command=command)
    evaluator = session.evaluator(settings.evaluation.max_tokens)
    columns = {"bf16": as_column(measure(session, "BF16", evaluator, session.teacher))}
    columns["ptq"] = as_column(measure_gap(session, ready_to_ship(session, ptq_student(session)), evaluator))
    if settings.report.compare_qat:
        qat_dir = settings.run_dir / "qat"
        if session.ranks.is_main:
            qat_dir.mkdir(exist_ok=True)
        dist.barrier()
        columns["qat"] = as_column(measure(session, "QAT", evaluator, train_student(session, qat_dir, Objective.QAT)))
    student = train_student(session, settings.run_dir, Objective.QAD)
    recovered = measure(session, "QAD", evaluator, student)
    columns["qad"] = as_column(recovered)
    write_json(settings.run_dir / "evaluation.json", asdict(recovered), session)
    write_export(session, student)
    compare_export(session, student)
    if session.ranks.is_main:
        found = {"columns": columns, "seconds": time.monotonic() - started, "command": ["megaqad", *sys.argv[1:]]}
        write_json(settings.run_dir / COLUMNS_FILE, found, session)
        show_report(settings)
