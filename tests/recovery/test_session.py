"""A session that cannot start leaves the process as it was."""

from pathlib import Path

import pytest

from megaqad import recovery
from megaqad.errors import UserError
from megaqad.runtime.lock import DirectoryLock
from tests.distillation.runs import SMALL_RUN
from tests.models.checkpoints import make_checkpoint
from tests.ranks import run_ranks


def start_in_a_directory_in_use(_rank: int, _size: int, settings: list[str], folder: Path) -> int:
    other = DirectoryLock(folder, "distill")
    with pytest.raises(UserError, match=r"is in use by `megaqad distill`"):
        recovery.start(settings)
    other.release()
    with recovery.start(settings) as run:
        return run.ranks.world_size


def test_after_a_refusal_the_next_one_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    model = make_checkpoint("qwen2", tmp_path / "model")
    settings = [*SMALL_RUN, f"model={model}", f"output_dir={run}", "quantization=nvfp4"]
    assert run_ranks(1, start_in_a_directory_in_use, settings, run) == [1]


def start_beside_a_foreign_file(_rank: int, _size: int, settings: list[str], own: Path) -> str:
    with recovery.start(settings):
        own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(UserError) as refused:
        recovery.start(settings)
    return str(refused.value)


def test_a_file_that_the_export_would_replace_is_seen_first(tmp_path: Path) -> None:
    """Not when training is done."""
    model = make_checkpoint("qwen2", tmp_path / "model")
    settings = [*SMALL_RUN, f"model={model}", f"output_dir={tmp_path / 'run'}", "quantization=nvfp4"]
    [line] = run_ranks(1, start_beside_a_foreign_file, settings, tmp_path / "run" / "export" / "README.md")
    assert "export already holds README.md, which is not replaced" in line


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="seed"):
        recovery.start(["experiment=demo", "seed=1", "seed=2"])
