"""Which checkpoint a run resumes from: the newest that is whole and that belongs to it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from megaqad.errors import UserError
from megaqad.runtime.agree import on_main
from megaqad.runtime.files import free_bytes
from megaqad.runtime.ranks import Ranks
from megaqad.training.checkpoint import damage, finished_checkpoints, step_directory

HEADERS_BYTES = 4 * 1024 * 1024
"""What a checkpoint needs beside its tensors; generously."""


def newest_good_checkpoint(run_dir: Path, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None when there has been none.

    Damaged ones are named and passed over.

    Collectives: one broadcast, and the exchanges of ``damage`` for every checkpoint looked at.

    Raises:
        UserError: there are checkpoints and all are damaged; to begin anew silently would hide the loss.
    """
    names: list[str] = on_main(lambda: [path.name for path in reversed(finished_checkpoints(run_dir))])
    for name in names:
        directory = run_dir / "checkpoints" / name
        problem = damage(directory, ranks, with_training=True)
        if problem is None:
            return directory
        say(f"{name} is damaged and passed over: {problem}")
    if names:
        raise UserError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged ({', '.join(names)}): restore one from a copy, "
            "or give another output_dir to begin anew"
        )
    return None


def remove_checkpoints_after(run_dir: Path, step: int) -> None:
    """Remove checkpoints of later steps: of a course that was left by going back to ``step``. Main rank only."""
    kept = step_directory(run_dir, step).name
    for path in finished_checkpoints(run_dir):
        if path.name > kept:
            shutil.rmtree(path, ignore_errors=True)


def check_free_disk(run_dir: Path, needed: int) -> None:
    """Refuse to train where the next checkpoint will not fit. Call on the main rank.

    Args:
        needed: bytes of tensors in one checkpoint.

    Raises:
        UserError: with both numbers.
    """
    needed += HEADERS_BYTES
    free = free_bytes(run_dir)
    if free < needed:
        raise UserError(
            f"the next checkpoint needs {needed / 1e9:.3f} GB and {run_dir} has {free / 1e9:.3f} GB free: make room or "
            "give another output_dir"
        )
