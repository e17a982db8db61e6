"""Disks that lie, fill up or refuse: said in one line, and nothing that was good is lost."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.runs import newest_step, outcome, wait_for

REFUSED = 2


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


HARMS = {
    truncate: "newest checkpoint: a file cut off",
    flip_bit: "newest checkpoint: one bit flipped in a file",
    remove: "newest checkpoint: a file removed",
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "name",
    ["weights/rank_00001.safetensors", "training/rank_00000.safetensors", "state.json", "manifest.json"],
)
def test_a_damaged_newest_checkpoint(harm, name, reference, runner, report, tmp_path):
    """Detected, named, and the one before it is gone on from."""
    run_dir = shutil.copytree(runner.folder / "reference", tmp_path / "run")
    newest = newest_step(run_dir)
    harm(run_dir / "checkpoints" / f"step_{newest:08d}" / name)
    output = runner.finish(run_dir).replace("\n", " ")
    assert f"step_{newest:08d} is damaged and passed over" in output
    # A bit of the manifest may be a bit of another file's digest: then that file is named.
    assert f"step_{newest:08d}/{'' if name == 'manifest.json' else name}" in output
    assert f"step {newest - 2}" in output.split("going on from")[1]
    assert outcome(run_dir) == reference
    report(HARMS[harm], f"named, went on from step {newest - 2}")


def test_all_checkpoints_damaged(reference, runner, tmp_path):
    """Not begun anew silently."""
    run_dir = shutil.copytree(runner.folder / "reference", tmp_path / "run")
    for path in (run_dir / "checkpoints").glob("step_*/state.json"):
        truncate(path)
    command = runner.start(run_dir)
    assert command.wait() == REFUSED
    assert "every checkpoint in" in last_line(command)
    assert last_line(command).count("step_") >= 2


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS", "EIO"])
@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("a rank's file", ("fail", "checkpoint write", 60, 1), ["on rank 1", "earlier checkpoints are intact"]),
        ("the manifest", ("fail", "manifest", 3, 0), ["on rank 0", "earlier checkpoints are intact"]),
        ("metrics.jsonl", ("fail_log", 5), ["metrics.jsonl cannot be written"]),
    ],
)
def test_a_write_that_the_system_refuses(error, name, fault, said, runner, reference, report, tmp_path):
    run_dir = tmp_path / "run"
    command = runner.start(run_dir, faults=[(*fault, error)])
    assert command.wait() == REFUSED, command.output
    for words in (os.strerror(vars(errno)[error]), *said):
        assert words in last_line(command)
    assert not list((run_dir / "checkpoints").glob(".*.writing"))
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("ENOSPC, EROFS, EIO while writing a rank's file, the manifest, metrics.jsonl", "named, exit code 2")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB: room for five checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(path, leave=0):
    """Take all the room there is but ``leave`` bytes."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while shutil.disk_usage(path.parent).free > leave:
            file.write(b"x" * 65536)


def test_a_full_disk(small_disk, runner, reference, report):
    """Filled by someone else while training runs; freed again."""
    run_dir = small_disk / "run"
    command = runner.start(run_dir, faults=[("slow", "data", 0.3)])
    wait_for(run_dir / "checkpoints" / "step_00000002" / "manifest.json")
    filler = small_disk / "filler"
    fill(filler)
    assert command.wait() == REFUSED, command.output
    assert "No space left on device" in last_line(command)
    kept = newest_step(run_dir)
    refused = runner.start(run_dir)
    assert refused.wait() == REFUSED, refused.output  # still full
    assert "No space left" in last_line(refused) or "GB free" in last_line(refused)
    filler.unlink()
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("disk full during a save (40 MB tmpfs)", f"named, exit code 2, step {kept} kept")


def test_too_little_disk_for_a_checkpoint(small_disk, runner, tmp_path):
    """Said before training starts."""
    fill(small_disk / "filler", leave=5_000_000)
    command = runner.start(small_disk / "run")
    assert command.wait() == REFUSED, command.output
    assert "the next checkpoint needs" in last_line(command)
    assert "GB free" in last_line(command)


def test_read_only_output(small_disk, runner, report):
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = runner.start(small_disk / "run")
    assert command.wait() == REFUSED, command.output
    assert "cannot be written (Read-only file system)" in last_line(command)


def test_output_turns_read_only(small_disk, runner, reference, report):
    """Between two saves, as a file system does that has seen an error."""
    run_dir = small_disk / "run"
    command = runner.start(run_dir, faults=[("slow", "data", 0.3), ("fail_log", 5, "EROFS")])
    command.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = runner.start(run_dir)
    assert refused.wait() == REFUSED
    assert "Read-only file system" in last_line(refused)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    report("output turns read-only", "named, exit code 2")


def test_two_runs_in_one_directory(runner, reference, report, tmp_path):
    """The second is refused by name; a killed first one leaves no lock behind."""
    run_dir = tmp_path / "run"
    first = runner.start(run_dir, faults=[("slow", "data", 2.0)])
    wait_for(run_dir / "checkpoints")
    second = runner.start(run_dir)
    assert second.wait() == REFUSED
    assert "is in use by `megaqad distill` (process" in last_line(second)
    for rank in (0, 1):
        first.signal(signal.SIGKILL, rank=rank)
    first.signal(signal.SIGKILL)
    began = time.monotonic()
    runner.finish(run_dir)
    assert outcome(run_dir) == reference
    assert time.monotonic() - began < 200
    report("two runs in one output_dir", "second refused with the first's process id; no lock left after SIGKILL")


def last_line(command):
    return command.output.strip().splitlines()[-1]
