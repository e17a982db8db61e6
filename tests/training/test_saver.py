"""What is kept, what is removed, and what a run remembers between its steps."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.training.checkpoint import latest_checkpoint, read_state
from megaqad.training.logs import MetricsLog, read_metrics
from megaqad.training.position import Position
from megaqad.training.resume import check_free_disk, remove_checkpoints_after
from megaqad.training.rng import rng_state, set_rng_state
from megaqad.training.saver import remove_leftovers, surplus


@pytest.mark.parametrize(
    ("kl_by_step", "keep", "keep_best", "removed"),
    [
        ([(10, None), (20, None), (30, None)], 2, 1, [10]),
        ([(10, 0.1), (20, 0.3), (30, 0.2), (40, 0.4)], 2, 1, [20]),
        ([(10, 0.1), (20, 0.3), (30, 0.2), (40, 0.4)], 1, 2, [20]),
        ([(10, 0.1), (20, 0.3), (30, 0.2), (40, 0.4)], 1, 0, [10, 20, 30]),
        ([(10, 0.1), (20, 0.1), (30, None)], 1, 1, [10]),  # of equals the newer
        ([(10, 0.1), (20, 0.05)], 2, 1, []),
        ([(20, None), (10, 0.1)], 1, 1, []),  # in any order
    ],
)
def test_newest_and_best_are_kept(kl_by_step, keep, keep_best, removed):
    assert surplus(kl_by_step, keep, keep_best) == removed


def test_leftovers_of_a_dead_run_are_removed(tmp_path):
    for name in (".step_00000004.ab12.writing", ".step_00000002.old", "step_00000002"):
        (tmp_path / name / "weights").mkdir(parents=True)
    (tmp_path / ".latest.writing").write_text("step_")
    (tmp_path / "latest").write_text("step_00000002")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (tmp_path / ".link.writing").symlink_to(outside)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".link.writing", "latest", "step_00000002"]
    assert outside.is_dir()


def test_checkpoints_of_a_course_that_was_left(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    remove_checkpoints_after(tmp_path, 4)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "step_1/../..", "", "step_x"])
def test_latest_cannot_lead_out(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(name)
    with pytest.raises(UserError, match="which is no checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"position": {}, "fingerprint": {}, "weather": 1}', '{"position": 3}']
)
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        read_state(tmp_path)


def test_too_little_room_is_said_with_both_numbers(tmp_path):
    check_free_disk(tmp_path, 1000)
    with pytest.raises(UserError, match=r"the next checkpoint needs 1000000000\.\d+ GB and .* has .* GB free"):
        check_free_disk(tmp_path, 10**18)


def test_random_generators_go_on_where_they_were():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves half a pair behind, which is state too
    np.random.randn()

    def draw():
        return [random.random(), random.gauss(0, 1), np.random.randn(2).tolist(), torch.randn(2).tolist()]

    kept = {name: state.clone() for name, state in rng_state().items()}
    assert all(state.dtype is torch.uint8 and state.ndim == 1 for state in kept.values())
    first = draw()
    assert draw() != first
    set_rng_state(kept)
    assert draw() == first


def test_position_survives_json():
    position = Position().after_good_step(8, 0.1234567890123456789, 3).after_bad_step(8).past_window(8, 24, 2)
    assert Position.from_json(json.loads(json.dumps(asdict(position)))) == position
    assert position == Position(2, 24, 1, 1, (0.1234567890123456789,), 2, ((8, 24),))


def test_a_good_step_ends_a_row_of_bad_ones():
    position = Position().after_bad_step(4).after_bad_step(4)
    assert (position.bad_steps, position.bad_in_a_row) == (2, 2)
    position = position.after_good_step(4, 1.0, 2).after_good_step(4, 2.0, 2).after_good_step(4, 3.0, 2)
    assert (position.step, position.bad_steps, position.bad_in_a_row) == (5, 2, 0)
    assert position.recent_losses == (2.0, 3.0)


def settings():
    return load_settings(["model=m", "output_dir=o", "data=random", "logging.wandb.mode=disabled"])


def test_metrics_have_neither_gaps_nor_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    log = MetricsLog(tmp_path, settings(), is_main=True, keep_steps=3)
    log.write({"step": 4, "loss": 40.0})
    log.rewind(2)
    log.write({"step": 3, "loss": 30.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_metrics_are_the_main_ranks_alone(tmp_path):
    log = MetricsLog(tmp_path, settings(), is_main=False)
    log.write({"step": 1})
    log.rewind(0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_a_problem_not_a_crash(tmp_path):
    log = MetricsLog(tmp_path, settings(), is_main=True)
    log._file.close()
    log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    log.write({"step": 1, "loss": 1.0})
    assert "metrics.jsonl cannot be written (No space left on device)" in log.problem
    log.close()
