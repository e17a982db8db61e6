"""Where a training run is: all that decides the next step beside the weights, the moments and the settings."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """A point between two steps."""

    step: int = 0
    """Steps behind it, skipped ones included: the schedule's position."""
    consumed_samples: int = 0
    """Training sequences behind it: the data's position."""
    bad_steps: int = 0
    """Steps skipped because a loss or gradient was not finite."""
    bad_in_a_row: int = 0
    """How many of the last steps were."""
    recent_losses: tuple[float, ...] = ()
    """Of the last good steps: what a spike is measured against."""
    rollbacks: int = 0
    """Times the run went back to the checkpoint at this position after a loss spike."""
    skipped_samples: tuple[tuple[int, int], ...] = field(default=())
    """Windows [first, end) of training sequences left out after a spike."""

    def after_good_step(self, samples: int, loss: float, remembered: int) -> "Position":
        """The position after a step that updated the weights."""
        recent = (*self.recent_losses, loss)[-remembered:]
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            bad_in_a_row=0,
            recent_losses=recent,
        )

    def after_bad_step(self, samples: int) -> "Position":
        """The position after a step that was skipped: schedule and data move on, weights and moments stay."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            bad_steps=self.bad_steps + 1,
            bad_in_a_row=self.bad_in_a_row + 1,
        )

    def past_window(self, first: int, end: int, rollbacks: int) -> "Position":
        """This position of a checkpoint, with the training sequences [first, end) left out."""
        return replace(
            self,
            consumed_samples=end,
            rollbacks=rollbacks,
            skipped_samples=(*self.skipped_samples, (first, end)),
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Position":
        """From what ``dataclasses.asdict`` and JSON made of it. Raises TypeError for other content."""
        position = cls(**content)
        return replace(
            position,
            recent_losses=tuple(float(loss) for loss in position.recent_losses),
            skipped_samples=tuple((int(first), int(end)) for first, end in position.skipped_samples),
        )
