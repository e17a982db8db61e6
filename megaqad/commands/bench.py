"""``megaqad bench kl | nvfp4 | step``: one JSON line per measurement on standard output.

Speeds are compared within one process, in turns; a ratio is worth reading, an absolute time is of this machine. On CPU
the ratios of ``bench kl`` depend on the allocator: with ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000``
freed memory is reused, as a GPU's caching allocator does.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megaqad.bench import nvfp4, step
from megaqad.bench.step import TimedStep
from megaqad.commands.session import Session
from megaqad.config import Settings
from megaqad.data import Batch
from megaqad.distillation.step import Objective
from megaqad.distillation.teachers import LiveTeacher
from megaqad.models.load import load_weights
from megaqad.models.model import Model
from megaqad.runtime import launch
from megaqad.runtime.ranks import ParallelSizes, join_ranks, parallel
from megaqad.training.optimizer import build_optimizer, wrap_for_training

REPEATS = 7


def bench_kl() -> None:
    """``megaqad bench kl``, on one process, or every rank's part of it under torchrun: the vocabulary sharded."""
    from megaqad.bench import kl, kl_contestants, sharded_kl, trained

    if launch.is_rank():
        join_ranks()
        kl_contestants.import_modelopt()  # it cannot be imported once the CPU device layer is on
        with parallel(ParallelSizes(tensor=dist.get_world_size())) as context:
            for row in sharded_kl.bench_sharded_kl(context):
                if context.is_main:
                    print(json.dumps(row), flush=True)
        return
    _print_rows(kl.bench_kl())
    _print_rows(trained.bench_trained())


def bench_nvfp4() -> None:
    """``megaqad bench nvfp4``, on one process."""
    _print_rows(nvfp4.bench_nvfp4())


def _print_rows(rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


def bench_step(settings: Settings) -> None:
    """Every rank's part of ``megaqad bench step``."""
    session = Session.start(settings)
    plain_model = session.random_model()
    load_weights(plain_model, settings.model_dir)
    student = session.calibrated_student()
    plain = _timed_step(session, plain_model, Objective.QAT)
    distilled = _timed_step(session, student, Objective.QAD)
    layout = {"world_size": session.ranks.world_size, "dtype": settings.runtime.dtype}
    rows = step.bench_step(plain, distilled, _one_batch(session), repeats=REPEATS)
    for row in rows:
        if session.ranks.is_main:
            print(json.dumps(row | layout), flush=True)


def _timed_step(session: Session, model: Model, objective: Objective) -> TimedStep:
    student = wrap_for_training(model)
    # A learning rate of 0 keeps both models where they are, so that every round times the same work.
    optimizer, scheduler = build_optimizer(student, replace(session.settings.train, lr=0.0, min_lr=0.0), session.dtype)
    teacher = LiveTeacher(session.teacher) if objective is Objective.QAD else None
    return TimedStep(model, student, optimizer, scheduler, objective=objective, teacher=teacher)


def _one_batch(session: Session) -> list[Batch]:
    train, ranks = session.settings.train, session.ranks
    batches = session.data.train.micro_batches(
        0,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_rank=ranks.data_rank,
        data_size=ranks.data_size,
    )
    return [batch.to(ranks.device) for batch in batches]
