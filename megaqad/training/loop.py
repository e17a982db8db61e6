"""The loop: read a global batch, take a step, log it, now and then measure and save, and know when to stop.

What can go wrong between two steps is decided here, on all ranks together. At the end of each step they exchange four
small numbers: has anyone been asked to stop, is anyone still writing a checkpoint, could anyone not, could the log not
be written. Everything that follows from it happens at the same step everywhere.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from megaqad.config import TrainSettings
from megaqad.data import Batch, TokenDataset
from megaqad.distillation.step import DistillationStep, StepResult
from megaqad.errors import StoppedEarly, UserError
from megaqad.runtime import signals
from megaqad.runtime.agree import device_of_group, raise_together
from megaqad.runtime.duration import seconds_of
from megaqad.training.logs import MetricsLog, Terminal
from megaqad.training.position import Position
from megaqad.training.saver import CheckpointSaver, SaveStatus

SPIKE_MEMORY = 20
"""Losses whose median a spike is measured against."""
SPIKE_MEMORY_LEAST = 10
"""Fewer say nothing yet."""
ROLLBACKS_MOST = 3
"""To the same checkpoint, before a person should look."""
TIME_IS_UP = 1000
"""Beside the numbers of signals, in the exchange between ranks."""


@dataclass
class Loop:
    """Everything one training run needs, put together by ``TrainingRun``."""

    step: DistillationStep
    data: TokenDataset
    settings: TrainSettings
    log: MetricsLog
    terminal: Terminal
    title: str
    """What the progress bar calls this run."""
    saver: CheckpointSaver
    save: Callable[[Position, float | None], None]
    """Begin a checkpoint: (where the run is, validation KL if just measured)."""
    save_every: int
    restore: Callable[[], Position]
    """Go back to the newest checkpoint, which is finished; where it is. Collective."""
    validate: Callable[[Callable[[], None]], dict[str, float]]
    """Held-out numbers, logged with the step; collective over all ranks. Calls its argument as it gets on."""
    validate_every: int
    """0: never while training."""
    held_out: str = ""
    """The newest held-out KL, for the terminal."""
    remark: dict[str, Any] | None = None
    """What the next row of the log says beside its numbers."""

    def run(self, position: Position) -> Position:
        """Train from ``position`` to ``settings.steps``; the last step is always saved. Where it ends.

        Raises:
            StoppedEarly: on a signal or when the time is up, with everything saved.
            UserError: too many bad steps in a row, too many rollbacks, or a checkpoint or the log cannot be written.
        """
        last = self.settings.steps
        started = time.monotonic()
        saver = self.saver
        with signals.deferred(), self.terminal.progress(self.title, last, done=position.step) as progress:

            def tick() -> None:
                progress.update(progress.task_ids[0], advance=0)

            while position.step < last:
                position = self._take_step(position, progress, tick)
            self.saver.finish(tick)
        if saver.saved:
            share = saver.waited_seconds / max(time.monotonic() - started, 1e-9)
            self.terminal.say(
                f"{saver.saved} checkpoints written; training waited {saver.waited_seconds:.2f} s ({share:.1%})"
            )
        return position

    def _take_step(self, before: Position, progress: Progress, tick: Callable[[], None]) -> Position:
        """One step and all that belongs to it; the position after it, or further back after a spike."""
        started = time.perf_counter()
        samples = self.settings.global_batch_size
        result = self.step(self._micro_batches(before.consumed_samples))
        if result.fault is None:
            position = before.after_good_step(samples, result.loss, SPIKE_MEMORY)
            if self._is_spike(before, result.loss):
                return self._roll_back(before, position.consumed_samples, result.loss, progress, tick)
        else:
            position = before.after_bad_step(samples)
            self.terminal.say(f"step {position.step} skipped: {result.fault}")
        row = self._row(position, result, time.perf_counter() - started)
        validation_kl = None
        if self.validate_every and (position.step % self.validate_every == 0 or position.step == self.settings.steps):
            row["validation"] = self.validate(tick)
            validation_kl = row["validation"].get("kl_to_teacher")
            self.held_out = "" if validation_kl is None else f"  held-out KL {validation_kl:.4f}"
        self.log.write(row)
        rate = f"{result.tokens / (time.perf_counter() - started):,.0f} tokens/s"
        note = f"loss {result.loss:.4f}{self.held_out}  {rate}"
        progress.update(progress.task_ids[0], completed=position.step, note=note)
        due = position.step % self.save_every == 0 or position.step == self.settings.steps
        if due:
            position = replace(position, rollbacks=0)
            self.save(position, validation_kl)
        self._end_of_step(position, validation_kl, saved=due, tick=tick)
        return position

    def _row(self, position: Position, result: StepResult, seconds: float) -> dict[str, Any]:
        """What ``metrics.jsonl`` says of the step; JSON knows no NaN, so a skipped step has null there."""
        good = result.fault is None
        row: dict[str, Any] = {
            "step": position.step,
            "loss": result.loss if good else None,
            "lr": result.lr,
            "grad_norm": result.grad_norm if good else None,
            "tokens": result.tokens,
            "seconds": round(seconds, 4),
        }
        if result.fault is not None:
            row["skipped"] = {
                "what": result.fault.what,
                "places": [{"rank": place.rank, "micro_batch": place.micro_batch} for place in result.fault.places[:8]],
                "bad_steps": position.bad_steps,
            }
        if self.remark is not None:
            row |= self.remark
            self.remark = None
        return row

    def _end_of_step(self, position: Position, kl: float | None, *, saved: bool, tick: Callable[[], None]) -> None:
        """The ranks' exchange, and what follows from it. Collective: one all-reduce of four numbers."""
        status = self.saver.status()
        flags = torch.tensor(
            [self._stop_wanted(), int(status.unfinished), int(status.failed), int(self.log.problem is not None)],
            dtype=torch.int32,
            device=device_of_group(),
        )
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, unfinished, failed, log_problem = flags.tolist()
        self.saver.advance(SaveStatus(bool(unfinished), bool(failed)))
        if log_problem:
            self.saver.finish(tick)
            raise_together(self.log.problem)
        if position.bad_in_a_row >= self.settings.max_bad_steps:
            self.saver.finish(tick)
            raise UserError(
                f"{position.bad_in_a_row} steps in a row were skipped because a loss or gradient was not finite, up to "
                f"step {position.step}: lower train.lr, or look at the data; earlier checkpoints are intact"
            )
        if stop and position.step < self.settings.steps:
            if not saved:
                self.save(replace(position, rollbacks=0), kl)
            self.saver.finish(tick)
            raise StoppedEarly(
                f"stopped by {_reason(stop)} after step {position.step} of {self.settings.steps}, which is saved: run "
                "the same command to go on"
            )

    def _stop_wanted(self) -> int:
        """Why this rank would stop now: a signal's number, ``TIME_IS_UP``, or 0."""
        limit = self.settings.stop_after
        if limit is not None and self.terminal.seconds > seconds_of(limit, "train.stop_after"):
            return TIME_IS_UP
        return signals.stop_number()

    def _is_spike(self, before: Position, loss: float) -> bool:
        """Whether a loss is far above those before it; the same on every rank, as the losses are."""
        recent = before.recent_losses
        if not self.settings.spike_factor or len(recent) < SPIKE_MEMORY_LEAST:
            return False
        return loss > self.settings.spike_factor * statistics.median(recent)

    def _roll_back(
        self, before: Position, end: int, loss: float, progress: Progress, tick: Callable[[], None]
    ) -> Position:
        """Go back to the newest checkpoint and past the training sequences that led to the spike.

        Args:
            end: training sequences consumed when the loss was seen.
        """
        if before.rollbacks >= ROLLBACKS_MOST:
            raise UserError(
                f"the loss of step {before.step + 1} is {loss:.4g}, the spike number {before.rollbacks + 1} since the "
                "last checkpoint: lower train.lr, look at the data, or raise train.spike_factor"
            )
        self.saver.finish(tick)
        restored = self.restore()
        self.log.rewind(restored.step)
        window = (restored.consumed_samples, end)
        self.remark = {
            "rolled_back": {"from_step": before.step + 1, "loss": loss, "skipped_samples": list(window)},
        }
        self.terminal.say(
            f"loss spike of {loss:.4g} at step {before.step + 1}: back to step {restored.step}, without training "
            f"sequences {window[0]} to {window[1] - 1}"
        )
        progress.update(progress.task_ids[0], completed=restored.step)
        return restored.past_window(*window, rollbacks=before.rollbacks + 1)

    def _micro_batches(self, consumed_samples: int) -> list[Batch]:
        """This data-parallel rank's share of the next global batch, on the run's device."""
        ranks = self.step.ranks
        batches = self.data.micro_batches(
            consumed_samples,
            global_batch_size=self.settings.global_batch_size,
            micro_batch_size=self.settings.micro_batch_size,
            data_rank=ranks.data_rank,
            data_size=ranks.data_size,
        )
        return [batch.to(ranks.device) for batch in batches]


def _reason(stop: int) -> str:
    return "train.stop_after" if stop == TIME_IS_UP else signals.name_of(stop)
