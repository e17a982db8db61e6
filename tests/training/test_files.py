"""Whole files, their digests, the manifest, the lock."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megaqad.errors import UserError
from megaqad.runtime import lock as lock_module
from megaqad.runtime.duration import seconds_of
from megaqad.runtime.files import (
    SAFETENSORS_DTYPES,
    Description,
    FileDigest,
    digest_of,
    free_bytes,
    write_safetensors,
    write_safetensors_as_they_come,
    write_text_whole,
)
from megaqad.runtime.lock import DirectoryLock
from megaqad.training.manifest import FILE, DamagedCheckpoint, check_file, read_manifest, write_manifest

TENSORS = {
    "matrix": torch.randn(3, 4).bfloat16(),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 2),
    "flags": torch.tensor([True, False]),
    "turned": torch.randn(4, 6).t(),
    "codes": torch.arange(7, dtype=torch.uint8),
    "scales": torch.randn(5).to(torch.float8_e4m3fn),
    "large": torch.randn(5_000_000),  # more than one block
}


def test_safetensors_are_what_the_library_reads(tmp_path):
    path = tmp_path / "some.safetensors"
    digest = write_safetensors(path, TENSORS, {"note": "hello"})
    assert digest == digest_of(path) == digest_of(path, from_disk=True)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"note": "hello"}
        for name, tensor in TENSORS.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = {}
    for number, dtype in enumerate(reversed(SAFETENSORS_DTYPES)):
        values = torch.arange(6).reshape(3, 2).t()  # not contiguous
        tensors |= {f"b.é{number}": values.to(dtype), f"a{number}": torch.ones(()).to(dtype)}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    described = [Description.of(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors_as_they_come(tmp_path / "came", reversed(tensors.items()), described, {"format": "pt"})
    assert (tmp_path / "came").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "tensors", {"w": torch.ones(2)}, {})
        write_text_whole(tmp_path / "text", "hello")
    finally:
        os.umask(before)
    for name in ("tensors", "text"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_text_whole(path, "old")

    def refuse(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_text_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_free_bytes_of_a_directory_to_be(tmp_path):
    assert 0 < free_bytes(tmp_path / "not" / "yet" / "there") <= os.statvfs(tmp_path).f_blocks * 4096


def manifest_of(folder, name="weights/rank_00000.safetensors", content=b"0123456789"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    write_manifest(folder, {name: digest_of(path)})
    return path


def test_manifest_finds_every_kind_of_damage(tmp_path):
    path = manifest_of(tmp_path)
    [(name, digest)] = read_manifest(tmp_path).items()
    check_file(tmp_path, name, digest)
    for content, said in ((b"012345678", "9 bytes instead of 10"), (b"0123456788", "has changed"), (None, "cannot be")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=said):
            check_file(tmp_path, name, digest)
        path.write_bytes(b"0123456789")


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "weights/../../secret", "", "..\\secret"])
def test_manifest_cannot_lead_out(tmp_path, name):
    content = {"files": {name: {"size": 1, "sha256": "0" * 64}}}
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match="outside of the checkpoint"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1}}}']
)
def test_broken_manifests_are_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_missing_manifest_means_unfinished(tmp_path):
    with pytest.raises(DamagedCheckpoint, match="never finished"):
        read_manifest(tmp_path)


HOLDER = """
import sys, time
from pathlib import Path
from megaqad.runtime.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]), "distill")
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE_SECONDS", 0.2)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"in use by `megaqad distill` \(process {process.pid} on "):
        DirectoryLock(tmp_path, "recover")
    process.kill()
    process.wait()
    lock = DirectoryLock(tmp_path, "recover")
    lock.release()
    DirectoryLock(tmp_path, "recover").release()


def test_a_file_system_without_locks_is_told_apart_from_a_broken_one(tmp_path, monkeypatch):
    def flock_that_answers(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        return flock

    monkeypatch.setattr(fcntl, "flock", flock_that_answers(errno.ENOSYS))
    assert not DirectoryLock(tmp_path, "distill").supported
    monkeypatch.setattr(fcntl, "flock", flock_that_answers(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        DirectoryLock(tmp_path, "distill")


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("90s", 90), ("20m", 1200), ("45", 45), ("1h1.5s", 3601.5)]
)
def test_durations(text, seconds):
    assert seconds_of(text, "train.stop_after") == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "soon", "1d", "5m3h", "nan"])
def test_durations_that_are_none(text):
    with pytest.raises(UserError, match=r"train\.stop_after=.* is no length of time"):
        seconds_of(text, "train.stop_after")


def test_digest_is_the_whole_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_of(tmp_path / "a") == FileDigest(
        3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
