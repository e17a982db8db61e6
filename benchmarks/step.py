"""What a QAD step costs over plain fine-tuning, and where the time goes.

Two steps of the same model, layout and tokens run in turns in one process: a cross-entropy step without quantization,
and a QAD step (teacher pass, NVFP4 forward, full-vocabulary KL). Their ratio has a floor of 8/6 = 1.33: counted in
forward passes, fine-tuning costs 3 and the teacher adds 1.

Each part has its own floor: what the same work costs in the fine-tuning step. For the teacher's pass that is the
fine-tuned model's forward, for the loss 4/3 of cross entropy's, since the teacher's head is a fourth matrix product
beside three; weight quantization has none. What a part costs over its floor is what is left to gain there.

Beside the two, in the same turns, the plain Hugging Face model, fine-tuned and, where it can run, distilled with
ModelOpt's quantizers (``peers.py``).

The parts of a step are timed inside it. Activation quantization happens within the student's forward pass; it shows as
the difference between that pass and the same pass of the fine-tuned model.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.profiler import record_function

from megaqad.config import Settings
from megaqad.data import Batch
from megaqad.distillation.step import DistillationStep, Objective, StepResult
from megaqad.distillation.teachers import LiveTeacher
from megaqad.models.causal_lm import CausalLM
from megaqad.models.model import Model
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import teacher_sequences
from megaqad.training.optimizer import build_optimizer, wrap_for_training

from . import peers
from .measure import in_turns, machine, peak_memory, seconds_of, wait
from .profiles import kernel_rows

PARTS = ("teacher forward", "student forward", "loss", "backward", "weight quantization", "optimizer and the rest")


def rows(settings: Settings, repeats: int = 7, *, profile: bool = False) -> Iterator[dict[str, Any]]:
    """Of ``megaqad bench step``, on the main rank; the other ranks' are empty.

    Args:
        profile: at the end also the kernels of one QAD step, part by part.
    """
    session = Session.start(settings)
    plain_model = session.with_weights(session.random_model(), settings.model_dir)
    student = session.calibrated_student()
    plain = _timed_step(session, plain_model, Objective.QAT)
    distilled = _timed_step(session, student, Objective.QAD)
    batches = _one_batch(session)
    layout = {"world_size": session.ranks.world_size, "dtype": settings.runtime.dtype}
    contestants, missing = peers.contestants(session, batches)
    measured = bench_step(plain, distilled, batches, contestants, repeats=repeats)
    common = layout | machine(session.ranks.device)
    for row in measured:
        if session.ranks.is_main:
            yield row | common | (_rates(row, session) if row["part"] == "step" else {})
    if session.ranks.is_main:
        yield from ({"bench": "step", "part": name, "skipped": why} for name, why in missing.items())
    if profile:
        kernels = kernel_rows(lambda: distilled(batches), PARTS, session.ranks.device)
        yield from kernels if session.ranks.is_main else ()


def _rates(row: Mapping[str, Any], session: Session) -> dict[str, float]:
    """Of whole steps: tokens and TFLOP per second and device, and as a share of what its matrix products reach.

    A fine-tuning step is three forward passes' worth of products, a QAD step four.
    """
    train, ranks = session.settings.train, session.ranks
    tokens = train.global_batch_size * train.sequence_length
    work = tokens * session.architecture.flops(train.sequence_length) / ranks.world_size / 1e12
    best = products_rate(ranks.device, session.dtype)
    found = {"products_tflops": best}
    for kind, passes in (("plain", 3), ("qad", 4)):
        rate = passes * work / row[f"{kind}_seconds"]
        found |= {
            f"{kind}_tokens_per_second": tokens / row[f"{kind}_seconds"],
            f"{kind}_tflops": rate,
            f"{kind}_share_of_products": rate / best,
        }
    return found


def products_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product: what a step could reach if it were nothing else."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    spent = in_turns({"product": lambda: seconds_of(lambda: one @ other, device)}, repeats=10)["product"]
    return 2 * size**3 / statistics.median(spent) / 1e12


def _timed_step(session: Session, model: Model, objective: Objective) -> "TimedStep":
    student = wrap_for_training(model)
    # A learning rate of 0 keeps both models where they are, so that every round times the same work.
    still, fused = replace(session.settings.train, lr=0.0, min_lr=0.0), session.settings.runtime.fused
    optimizer, scheduler = build_optimizer(student, still, session.dtype, fused=fused)
    teacher = None
    if objective is Objective.QAD:
        teacher = LiveTeacher(session.teacher, sequences=teacher_sequences(session))
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


class TimedStep(DistillationStep):
    """A ``DistillationStep`` that keeps the seconds of its parts; nothing else differs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._running: dict[str, float] = defaultdict(float)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        wait(self.ranks.device)
        started = time.perf_counter()
        with record_function(part):
            yield
            wait(self.ranks.device)
        self._running[part] += time.perf_counter() - started

    def __call__(self, micro_batches: Sequence[Batch]) -> StepResult:
        self._running.clear()
        dist.barrier()
        with self._timed("step"):
            result = super().__call__(micro_batches)
        with self._timed("weight quantization"):  # once more, alone: inside the step it is part of the rest
            self.model.changed()
        parts = self._running
        parts["backward"] -= parts["student forward"] + parts["loss"]
        known = ("teacher forward", "student forward", "loss", "backward", "weight quantization")
        parts["optimizer and the rest"] = parts["step"] - sum(parts[part] for part in known)
        for part in ("step", *PARTS):
            self.seconds[part].append(parts[part])
        return result

    def _with_teacher(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        with self._timed("teacher forward"):
            return super()._with_teacher(micro_batches)

    def _forward_backward(self, micro_batches: list[Batch], *, force_all_reduce: bool = False) -> list[Tensor]:
        with self._timed("backward"):  # forward and loss are taken off afterwards
            return super()._forward_backward(micro_batches, force_all_reduce=force_all_reduce)

    def _forward_step(self, batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        with self._timed("student forward"):
            return super()._forward_step(batches, model)

    def _loss(self, hidden: Tensor, model: CausalLM, batch: Batch) -> Tensor:
        with self._timed("loss"):
            return super()._loss(hidden, model, batch)


def bench_step(
    plain: TimedStep,
    distilled: TimedStep,
    micro_batches: Sequence[Batch],
    contestants: Mapping[str, Callable[[], object]] = MappingProxyType({}),
    *,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Time both steps in turns; one JSON-able dict per part, and one for the whole step.

    Args:
        plain: cross entropy, no quantizers.
        distilled: QAD, quantizers on, in the same layout.
        micro_batches: this data-parallel rank's share of one global batch.
        contestants: other steps of the same model and tokens, by name.
        repeats: rounds, after one that is not counted; medians are reported.

    Yields:
        ``part``, ``plain_seconds``, ``qad_seconds``, ``over_plain_step`` (the QAD part as a share of the whole plain
        step), ``over_floor`` (what it costs beyond its floor, as such a share), and for ``part="step"`` the ``ratio``,
        its floor, and for both steps ``peak_tensor_bytes`` and ``peak_resident_bytes`` beyond what is held between
        steps. A contestant's ``<name>_seconds`` stand in the whole step's row, with how often ours fit into them.

    Collectives: those of the steps. Seconds are this rank's.
    """
    others: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for step in (plain, distilled):
            step(micro_batches)
            if round_number == 0:
                step.seconds.clear()
        for name, run in contestants.items():
            spent = seconds_of(run, plain.ranks.device)
            if round_number:
                others[name].append(spent)
    ours_of, theirs_of = (
        {part: statistics.median(step.seconds[part]) for part in ("step", *PARTS)} for step in (distilled, plain)
    )
    whole = theirs_of["step"]
    floors = _floors(theirs_of)
    for part in ("step", *PARTS):
        ours, theirs = ours_of[part], theirs_of[part]
        row: dict[str, Any] = {
            "bench": "step",
            "part": part,
            "plain_seconds": theirs,
            "qad_seconds": ours,
            "over_plain_step": ours / whole,
            "over_floor": (ours - floors[part]) / whole,
        }
        if part == "step":
            pairs = zip(distilled.seconds[part], plain.seconds[part], strict=True)
            row |= {"ratio": statistics.median(qad / fine_tuning for qad, fine_tuning in pairs), "floor": 8 / 6}
            row |= _memory("plain", plain, micro_batches) | _memory("qad", distilled, micro_batches)
            row |= {f"{name}_seconds": statistics.median(spent) for name, spent in others.items()}
            row |= {f"{name}_over_plain": row[f"{name}_seconds"] / theirs for name in others}
            row |= {f"{name}_over_qad": row[f"{name}_seconds"] / ours for name in others}
        yield row


def _floors(plain: Mapping[str, float]) -> dict[str, float]:
    """Seconds that each part of a QAD step cannot do without, from the fine-tuning step's."""
    floors = {
        **plain,
        "teacher forward": plain["student forward"],
        "loss": plain["loss"] * 4 / 3,
        "weight quantization": 0.0,
    }
    return {**floors, "step": sum(floors[part] for part in PARTS)}


def _memory(name: str, step: TimedStep, micro_batches: Sequence[Batch]) -> dict[str, int | None]:
    """The most one step needs beyond what is held between steps. Collectives: those of one step, on CPU of two."""
    peak = peak_memory(lambda: step(micro_batches), step.ranks.device)
    return {f"{name}_peak_tensor_bytes": peak.tensor_bytes, f"{name}_peak_resident_bytes": peak.resident_bytes}
