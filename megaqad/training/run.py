"""One training run in one directory, from wherever it stands to its last step.

    find the newest good checkpoint -> the same run? -> load -> room for the next one? -> loop

A run that was interrupted anywhere goes through here again and gives the numbers that it would have given.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaqad.config import Settings
from megaqad.data import TokenDataset
from megaqad.distillation.step import DistillationStep
from megaqad.identity import check_same_run
from megaqad.models.model import Model
from megaqad.runtime.agree import device_of_group, on_main
from megaqad.training.checkpoint import (
    CheckpointState,
    layout_of,
    load_checkpoint,
    read_state,
    step_directory,
)
from megaqad.training.logs import MetricsLog, Terminal
from megaqad.training.loop import Loop
from megaqad.training.pieces import allocate_state, model_pieces, optimizer_pieces, updates_done
from megaqad.training.position import Position
from megaqad.training.resume import check_free_disk, newest_good_checkpoint, remove_checkpoints_after
from megaqad.training.saver import CheckpointSaver, mark_latest, remove_leftovers, remove_surplus


@dataclass
class TrainingRun:
    """Built by a command; ``run`` does the rest."""

    run_dir: Path
    settings: Settings
    terminal: Terminal
    title: str
    """What the progress bar calls it."""
    model: Model
    """Bare: what ``step`` trains inside its DDP."""
    step: DistillationStep
    data: TokenDataset
    fingerprint: dict[str, Any]
    """What a checkpoint must agree with to be resumed."""
    validate: Callable[[Callable[[], None]], dict[str, float]]
    """Held-out numbers; calls its argument as it gets on."""
    _saver: CheckpointSaver | None = field(default=None, init=False)

    def run(self) -> Position:
        """Train to the last step. Where the run ended.

        Raises:
            StoppedEarly: on a signal or a time limit, with everything saved.
            UserError: another run's checkpoint, no room on the disk, all checkpoints damaged, or as ``Loop.run``.
        """
        settings = self.settings
        self._saver = CheckpointSaver(self.model.ranks, on_commit=self._on_commit)
        on_main(self._prepare_directory)
        position = self._go_on()
        self._check_room()
        log = MetricsLog(self.run_dir, settings, is_main=self.model.ranks.is_main, keep_steps=position.step)
        try:
            if settings.train.spike_factor and position.step == 0:
                self._save(position, None)  # what a spike before the first checkpoint goes back to
            return Loop(
                step=self.step,
                data=self.data,
                settings=settings.train,
                log=log,
                terminal=self.terminal,
                title=self.title,
                saver=self._saver,
                save=self._save,
                save_every=settings.checkpoint.every,
                restore=self._restore,
                validate=self.validate,
                validate_every=settings.evaluation.every,
            ).run(position)
        finally:
            log.close()

    def _prepare_directory(self) -> None:
        (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.run_dir / "checkpoints")

    def _go_on(self) -> Position:
        """Load the newest good checkpoint, if there is one."""
        newest = newest_good_checkpoint(self.run_dir, self.model.ranks, self.terminal.say)
        if newest is None:
            allocate_state(self.step.optimizer)
            return Position()
        recorded = read_state(newest).fingerprint
        check_same_run(recorded, self.fingerprint, self.settings.resume.allow, f"{newest}")
        position = self._load(newest)
        self.terminal.say(f"going on from {newest}, step {position.step}")
        if self.model.ranks.is_main:
            mark_latest(self.run_dir, newest)
        return position

    def _restore(self) -> Position:
        """After a spike: back to the newest checkpoint, which is finished."""
        newest = newest_good_checkpoint(self.run_dir, self.model.ranks, self.terminal.say)
        assert newest is not None, "a run that rolls back saves before its first step"
        position = self._load(newest)
        on_main(lambda: remove_checkpoints_after(self.run_dir, position.step))
        return position

    def _load(self, directory: Path) -> Position:
        optimizer, scheduler = self.step.optimizer, self.step.scheduler
        state = load_checkpoint(directory, self.model, optimizer, scheduler, checked=True)
        return state.position

    def _save(self, position: Position, validation_kl: float | None) -> None:
        """Collective: one maximum, since a rank with nothing to train has counted no updates."""
        assert self._saver is not None
        updates = torch.tensor([updates_done(self.step.optimizer)], device=device_of_group())
        dist.all_reduce(updates, op=dist.ReduceOp.MAX)
        state = CheckpointState(
            position=position,
            fingerprint=self.fingerprint,
            layout=layout_of(self.model.ranks),
            updates=int(updates.item()),
            validation_kl=validation_kl,
            settings=asdict(self.settings),
        )
        self._saver.start(step_directory(self.run_dir, position.step), self.model, state, self.step.optimizer)

    def _on_commit(self, directory: Path) -> None:
        """On the main rank's thread: a checkpoint is whole."""
        mark_latest(self.run_dir, directory)
        remove_surplus(self.run_dir, self.settings.checkpoint.keep, self.settings.checkpoint.keep_best)

    def _check_room(self) -> None:
        """Collective: one sum and one broadcast."""
        pieces = [
            *model_pieces(self.model),
            *optimizer_pieces(self.step.optimizer, self.model),
        ]
        mine = sum(local.data.numel() * local.data.element_size() for local in pieces if local.owned)
        total = torch.tensor([mine], dtype=torch.int64, device=device_of_group())
        dist.all_reduce(total)
        on_main(lambda: check_free_disk(self.run_dir, int(total.item())))
