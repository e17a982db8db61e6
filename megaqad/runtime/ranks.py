"""Ranks laid out as tensor x pipeline x data x expert parallel groups, and the handle by which all code reaches them.

``initialize_parallel`` joins the ranks (started by torchrun, srun or ``launch.py``) and builds Megatron-Core's
process groups. A model carries the returned ``Ranks``; nothing in megaqad asks a global for a group.

Ranks are numbered tensor-parallel first, then data-parallel, then pipeline stages. Expert-parallel ranks are
neighbouring data-parallel ranks: each has its own tokens and some of the experts.
"""

import datetime
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from megaqad.errors import UserError
from megaqad.runtime.cpu import enable_cpu_device
from megaqad.runtime.launch import STORE_VARIABLE
from megaqad.runtime.sizes import ParallelSizes

__all__ = [
    "ParallelSizes",
    "Ranks",
    "initialize_parallel",
    "join_ranks",
    "leave_ranks",
    "parallel",
    "shutdown_parallel",
]

ATTEMPT_VARIABLE = "MEGAQAD_ATTEMPT"
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: BF16 matrix products, and Triton's kernels."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's place in the layout, with the process groups to talk over."""

    sizes: ParallelSizes
    groups: ProcessGroupCollection
    rank: int
    world_size: int
    device: torch.device

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return self.groups.tp

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return self.groups.pp

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.groups.dp

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def expert_rank(self) -> int:
        """Among the ranks that share the experts of a layer."""
        return self.groups.ep.rank()

    @property
    def expert_group(self) -> dist.ProcessGroup:
        return self.groups.ep

    @property
    def expert_data_group(self) -> dist.ProcessGroup:
        """The ranks that hold copies of the same experts."""
        return self.groups.expt_dp

    def local_experts(self, count: int) -> range:
        """Which of a layer's ``count`` experts are on this rank."""
        each = count // self.sizes.expert
        return range(self.expert_rank * each, (self.expert_rank + 1) * each)

    def rank_of(self, *, stage: int, expert_rank: int = 0) -> int:
        """Global rank of the first tensor-parallel rank of a stage, of the first copy of the experts there."""
        return stage * (self.world_size // self.sizes.pipeline) + expert_rank * self.sizes.tensor

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.sizes.pipeline - 1

    @property
    def is_main(self) -> bool:
        """The rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.sizes.pipeline - 1)


def local_device() -> torch.device:
    """The device that this rank computes on: its own GPU, or the CPU where there is none.

    Some launchers (``srun --gpus-per-task=1``) show every rank one GPU only, which is then its number 0.

    Raises:
        UserError: more ranks on this machine than GPUs, or a GPU that the kernels do not run on.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and "SLURM_LOCALID" not in os.environ
    if local_rank >= gpus and (gpus > 1 or shared):
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine shows {gpus}; start one rank per GPU or make the layout "
            "smaller"
        )
    device = torch.device("cuda", local_rank if gpus > 1 else 0)
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        found, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, the kernels need "
            f"{least[0]}.{least[1]} (A100, RTX 30): use such a GPU, or CUDA_VISIBLE_DEVICES= for the CPU"
        )
    return device


def join_ranks(timeout_minutes: float = 30.0) -> None:
    """Join the default process group from the RANK / WORLD_SIZE / MASTER_ADDR environment; alone without it."""
    if dist.is_initialized():
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = "RANK" not in os.environ
    rank, world_size = (0, 1) if alone else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.HashStore() if alone else _shared_store(rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,  # else NCCL guesses it, and warns
    )


def leave_ranks() -> None:
    """Leave the process groups, at the end of a command; NCCL warns of those that the end of the process finds.

    Not after an error on this rank alone: the others may be in a collective, and only the end of this process tells
    them.
    """
    if dist.is_initialized():
        shutdown_parallel()
        dist.destroy_process_group()


def _shared_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Where the ranks find one another's addresses: at MASTER_ADDR, under the number of torchrun's attempt; under
    ``launch.py`` on the socket that it opened for the first of them.

    torchrun's static rendezvous keeps one store through all its restarts, and the addresses of the dead ranks in it.
    Its other rendezvous makes a new store every time, and its agents may count restarts differently: so the number is
    used only where one agent counts for all, or where ``launch/torchrun.sh`` vouches for it.
    """
    listening = os.environ.get(STORE_VARIABLE)
    if listening is not None:
        port, descriptor = int(os.environ["MASTER_PORT"]), int(listening)
        return dist.TCPStore("127.0.0.1", port, world_size, True, timeout, master_listen_fd=descriptor)
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    one_agent = os.environ.get("GROUP_WORLD_SIZE") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT" if one_agent else ATTEMPT_VARIABLE)
    return store if attempt is None else dist.PrefixStore(f"attempt_{attempt}", store)


def initialize_parallel(sizes: ParallelSizes, *, seed: int = 0) -> Ranks:
    """Build the process groups of ``sizes`` over the default group (already joined) and seed every rank.

    Model parallel ranks of one data parallel replica share the seed except where Megatron-Core's RNG tracker
    must differ (tensor-parallel weight initialization).

    Raises:
        AssertionError: the world is not a multiple of ``sizes.model_ranks`` (config/checks.py refuses this).
    """
    world_size = dist.get_world_size()
    assert world_size % sizes.model_ranks == 0, f"{world_size} ranks do not divide into {sizes}"
    if not torch.cuda.is_available():
        enable_cpu_device()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Ranks(
        sizes=sizes,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        rank=dist.get_rank(),
        world_size=world_size,
        device=local_device(),
    )


def shutdown_parallel() -> None:
    """Undo ``initialize_parallel``; the default process group stays."""
    parallel_state.destroy_model_parallel()


@contextmanager
def parallel(sizes: ParallelSizes, *, seed: int = 0) -> Iterator[Ranks]:
    """``initialize_parallel`` for the length of a ``with`` block."""
    context = initialize_parallel(sizes, seed=seed)
    try:
        yield context
    finally:
        shutdown_parallel()
