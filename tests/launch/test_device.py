"""Which GPU a rank takes, under every launcher, without one."""

import pytest
import torch

from megaqad.errors import UserError
from megaqad.runtime.ranks import local_device


@pytest.fixture
def machine(monkeypatch):
    def pretend(gpus, capability=(9, 0), **environment):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return str(local_device())

    return pretend


def test_each_local_rank_has_its_own(machine):
    assert machine(0, LOCAL_RANK="3") == "cpu"
    assert machine(1) == "cuda:0"
    assert machine(8, LOCAL_RANK="3", LOCAL_WORLD_SIZE="8") == "cuda:3"


def test_slurm_may_show_every_rank_one_gpu(machine):
    assert machine(1, LOCAL_RANK="3", SLURM_LOCALID="3") == "cuda:0"


def test_more_ranks_than_gpus_are_refused(machine):
    for gpus in (1, 2):
        with pytest.raises(UserError, match=rf"local rank 2 has no GPU: this machine shows {gpus}"):
            machine(gpus, LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")


def test_a_gpu_without_bfloat16_is_refused(machine):
    with pytest.raises(UserError, match=r"Tesla V100 has compute capability 7\.0, the kernels need 8\.0"):
        machine(1, capability=(7, 0))
