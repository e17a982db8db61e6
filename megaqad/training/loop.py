"""The loop: read a global batch, take a step, log it, and now and then measure and save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaqad.config import TrainSettings
from megaqad.data import TokenDataset
from megaqad.distillation.step import DistillationStep, MicroBatch
from megaqad.training.logs import MetricsLog, Terminal


@dataclass(frozen=True)
class Loop:
    """Everything one training run needs, put together by its command."""

    step: DistillationStep
    data: TokenDataset
    settings: TrainSettings
    log: MetricsLog
    terminal: Terminal
    title: str
    """What the progress bar calls this run."""
    save: Callable[[int, int], None]
    """Write a checkpoint: (steps done, samples consumed)."""
    save_every: int
    validate: Callable[[], dict[str, float]]
    """Held-out numbers, logged with the step; collective over all ranks."""
    validate_every: int
    """0: never while training."""

    def run(self, first_step: int = 0, consumed_samples: int = 0) -> None:
        """Train from after ``first_step`` to ``settings.steps``; the last step is always saved.

        Raises:
            FloatingPointError: the loss is not finite. Nothing newer than the last checkpoint is lost.
        """
        last = self.settings.steps
        with self.terminal.progress(self.title, last, done=first_step) as progress:
            for number in range(first_step + 1, last + 1):
                started = time.perf_counter()
                result = self.step(self._micro_batches(consumed_samples))
                consumed_samples += self.settings.global_batch_size
                if not math.isfinite(result.loss):
                    raise FloatingPointError(f"the loss of step {number} is {result.loss}")
                row: dict[str, Any] = {
                    "step": number,
                    "loss": result.loss,
                    "lr": result.lr,
                    "grad_norm": result.grad_norm,
                    "tokens": result.tokens,
                    "seconds": round(time.perf_counter() - started, 4),
                }
                if self.validate_every and (number % self.validate_every == 0 or number == last):
                    row["validation"] = self.validate()
                self.log.write(row)
                progress.update(progress.task_ids[0], advance=1, note=f"loss {result.loss:.4f}")
                if number % self.save_every == 0 or number == last:
                    self.save(number, consumed_samples)

    def _micro_batches(self, consumed_samples: int) -> list[MicroBatch]:
        """This data-parallel rank's share of the next global batch, on the run's device."""
        context = self.step.context
        batches = self.data.micro_batches(
            consumed_samples,
            global_batch_size=self.settings.global_batch_size,
            micro_batch_size=self.settings.micro_batch_size,
            data_rank=context.data_rank,
            data_size=context.data_size,
        )
        return [
            MicroBatch(
                tokens=batch.tokens.to(context.device),
                labels=batch.labels.to(context.device),
                token_weights=batch.loss_mask.to(context.device),
            )
            for batch in batches
        ]
