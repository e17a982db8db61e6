"""Saving while training continues: copy, write behind, check, and only then let ``latest`` move.

``start`` copies this rank's pieces into host memory, which is all that training waits for. A thread then writes them to
files of a hidden directory, flushes them and reads them back from the disk. Ranks compare how far they are where they
talk anyway, at the end of each step; when all have finished, the first rank writes ``state.json`` and the manifest,
renames the directory and moves ``latest``, on a thread as well. No collective is ever issued from a thread.

    training thread   copy | step ... step | gather digests | step ... | done
    rank's thread          | write, flush, read back |
    first rank's thread                              | manifest, rename, latest, remove old |

Whatever dies at whatever moment, the directories under their final names are whole; what has a hidden name is removed
when the next run starts. A write that fails (the disk is full) stops the run with the last good checkpoint in place.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megaqad.errors import UserError
from megaqad.models.model import Model
from megaqad.runtime.agree import any_rank
from megaqad.runtime.files import FileDigest, digest_of, sync_directory, write_text_whole
from megaqad.runtime.ranks import Ranks
from megaqad.training.checkpoint import (
    STATE_FILE,
    TRAINING,
    WEIGHTS,
    CheckpointState,
    finished_checkpoints,
    local_rng_pieces,
    read_state,
    state_text,
)
from megaqad.training.manifest import DamagedCheckpoint, check_file, check_size, read_manifest, write_manifest
from megaqad.training.pieces import model_pieces, optimizer_pieces
from megaqad.training.store import HostPiece, PieceReader, to_host, write_pieces

POLL_SECONDS = 0.05


class _Work(threading.Thread):
    """A function on a thread whose outcome is asked for later."""

    def __init__(self, function: Callable[[], dict[str, FileDigest]], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._function = function
        self.result: dict[str, FileDigest] = {}
        self.problem: str | None = None
        self.defect: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._function()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            self.problem = f"{error.strerror or error}{where}"
        except (UserError, DamagedCheckpoint) as error:
            self.problem = str(error)
        except Exception as error:  # raised again on the training thread
            self.problem, self.defect = repr(error), error


@dataclass
class _Save:
    """A checkpoint on its way to the disk."""

    final: Path
    temporary: Path
    state: CheckpointState
    work: _Work
    committing: bool = False


@dataclass(frozen=True)
class SaveStatus:
    """This rank's part of the ranks' exchange at the end of a step."""

    unfinished: bool
    failed: bool


class CheckpointSaver:
    """Writes one checkpoint at a time; every rank has one and calls the same methods in the same order."""

    def __init__(self, ranks: Ranks, *, on_commit: Callable[[Path], None] = lambda _: None) -> None:
        """
        Args:
            on_commit: called with the finished checkpoint on the first rank, on a thread: moves ``latest``.

        Collective: one broadcast, of a name that no other attempt uses.
        """
        self._ranks = ranks
        self._on_commit = on_commit
        attempt = [secrets.token_hex(4)]
        dist.broadcast_object_list(attempt, src=0)
        self._attempt = attempt[0]
        self._save: _Save | None = None
        self.waited_seconds = 0.0
        """What the training thread has spent on saving so far."""
        self.saved = 0
        """Checkpoints finished."""

    def start(
        self,
        final: Path,
        model: Model,
        state: CheckpointState,
        optimizer: MegatronOptimizer | None = None,
    ) -> None:
        """Begin a checkpoint of the model as it is now.

        Args:
            final: the directory's name when it is whole.
            model: bare, not in DDP.
            optimizer: to write training state too.

        Collectives: none, unless a save is still under way: then those of ``finish``.
        """
        if self._save is not None:
            self.finish()
        started = time.perf_counter()
        files = {WEIGHTS: to_host(model_pieces(model))}
        if optimizer is not None:
            files[TRAINING] = to_host([*optimizer_pieces(optimizer, model), *local_rng_pieces(self._ranks)])
        temporary = final.with_name(f".{final.name}.{self._attempt}.writing")
        work = _Work(lambda: self._write(temporary, files), "checkpoint")
        self._save = _Save(final, temporary, state, work)
        work.start()
        self.waited_seconds += time.perf_counter() - started

    def status(self) -> SaveStatus:
        """How far this rank is; no collective."""
        if self._save is None:
            return SaveStatus(unfinished=False, failed=False)
        work = self._save.work
        return SaveStatus(unfinished=work.is_alive(), failed=not work.is_alive() and work.problem is not None)

    def advance(self, overall: SaveStatus) -> None:
        """Go one stage on when all ranks are ready for it.

        Args:
            overall: the logical or of all ranks' ``status``, the same everywhere.

        Collectives: a gather of file names and digests when the last rank has written, of messages after a failure.

        Raises:
            UserError: the checkpoint could not be written, and where, and why.
        """
        started = time.perf_counter()
        self._advance(overall)
        self.waited_seconds += time.perf_counter() - started

    def _advance(self, overall: SaveStatus) -> None:
        if self._save is None or overall.unfinished:
            return
        if overall.failed:
            self._fail(self._save)
        elif self._save.committing:
            self._save = None
            self.saved += 1
        else:
            self._begin_commit(self._save)

    def finish(self, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until nothing is under way.

        Args:
            tick: called now and then while waiting.

        Collectives: two small all-reduces per round, and those of ``advance``.

        Raises:
            UserError: as ``advance``.
        """
        started = time.perf_counter()
        while self._save is not None:
            self._save.work.join(POLL_SECONDS)
            status = self.status()
            self._advance(SaveStatus(any_rank(status.unfinished), any_rank(status.failed)))
            tick()
        self.waited_seconds += time.perf_counter() - started

    def _write(self, temporary: Path, files: dict[str, list[HostPiece]]) -> dict[str, FileDigest]:
        """On this rank's thread: its files, written, flushed and read back."""
        digests: dict[str, FileDigest] = {}
        for folder, pieces in files.items():
            (temporary / folder).mkdir(parents=True, exist_ok=True)
            if not pieces:
                continue
            name = f"{folder}/rank_{self._ranks.rank:05d}.safetensors"
            written = write_pieces(temporary / name, pieces)
            if digest_of(temporary / name, from_disk=True) != written:
                raise DamagedCheckpoint(f"{temporary / name} reads back differently from what was written")
            digests[name] = written
        return digests

    def _begin_commit(self, save: _Save) -> None:
        """All ranks have written: collect what, and let the first rank finish the directory."""
        gathered: list[dict[str, FileDigest]] = [{}] * self._ranks.world_size
        dist.all_gather_object(gathered, save.work.result)
        digests = {name: digest for part in gathered for name, digest in part.items()}
        save.committing = True
        save.work = _Work(lambda: self._commit(save, digests) if self._ranks.is_main else {}, "checkpoint")
        save.work.start()

    def _commit(self, save: _Save, digests: dict[str, FileDigest]) -> dict[str, FileDigest]:
        """On the first rank's thread: from files to a checkpoint."""
        for name, digest in digests.items():
            check_size(save.temporary, name, digest)
        reader = PieceReader(save.temporary / name for name in digests)
        incomplete = reader.incomplete()
        reader.close()
        assert not incomplete, f"the ranks' pieces do not cover {incomplete[0]} exactly once"
        state = write_text_whole(save.temporary / STATE_FILE, state_text(save.state))
        check_file(save.temporary, STATE_FILE, state)
        for folder in {Path(name).parent for name in digests}:
            sync_directory(save.temporary / folder)
        files = {**digests, STATE_FILE: state}
        write_manifest(save.temporary, files)
        if read_manifest(save.temporary) != files:
            raise DamagedCheckpoint(f"the manifest in {save.temporary} reads back differently from what was written")
        _put_in_place(save.temporary, save.final)
        self._on_commit(save.final)
        return digests

    def _fail(self, save: _Save) -> None:
        """One rank could not write: remove the attempt and say so on all."""
        problems: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(problems, save.work.problem)
        rank, problem = next((rank, text) for rank, text in enumerate(problems) if text is not None)
        self._save = None
        if self._ranks.is_main:
            shutil.rmtree(save.temporary, ignore_errors=True)
        if save.work.defect is not None:
            raise save.work.defect
        raise UserError(
            f"the checkpoint {save.final} could not be written on rank {rank}: {problem}; earlier checkpoints are "
            "intact, make room or fix the disk and run the same command to resume"
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename a whole directory to its final name; one that is there already (damaged, or left behind) gives way."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def mark_latest(run_dir: Path, directory: Path) -> None:
    """Point ``latest`` at a finished checkpoint."""
    write_text_whole(run_dir / "checkpoints" / "latest", directory.name + "\n")


def surplus(kl_by_step: Sequence[tuple[int, float | None]], keep: int, keep_best: int) -> list[int]:
    """Steps whose checkpoints are neither among the newest ``keep`` nor the best ``keep_best`` by validation KL.

    Args:
        kl_by_step: (step, validation KL where it was measured) of every checkpoint.
    """
    steps = sorted(step for step, _ in kl_by_step)
    measured = sorted((kl, -step) for step, kl in kl_by_step if kl is not None)  # of equal ones the newer
    kept = {*steps[-keep:], *(-negative for _, negative in measured[:keep_best])}
    return [step for step in steps if step not in kept]


def remove_surplus(run_dir: Path, keep: int, keep_best: int) -> None:
    """Remove the checkpoints that nobody asked to keep."""
    states = {}
    for directory in finished_checkpoints(run_dir):
        try:
            state = read_state(directory)
        except UserError:
            continue  # damaged: left to be looked at
        states[state.position.step] = (directory, state.validation_kl)
    for step in surplus([(step, kl) for step, (_, kl) in states.items()], keep, keep_best):
        shutil.rmtree(states[step][0], ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that died left half-written; only while this run holds the directory's lock."""
    for path in folder.glob(".*"):
        if path.name.endswith((".writing", ".old")) and not path.is_symlink():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
