"""Between a step's first kernel and its last nothing asks for a number on the device, which would wait for it.

On the CPU such questions are the same calls: ``.item()``, ``.tolist()``, ``bool()`` of a tensor, ``nonzero``, indexing
by a mask. They are counted as they are dispatched.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaqad.config import load_settings
from megaqad.data.batch import Batch
from megaqad.distillation.step import DistillationStep
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import divergence_of, teacher_of
from megaqad.runtime.ranks import shutdown_parallel
from tests.distillation.runs import SMALL_RUN, qad_step
from tests.models.checkpoints import make_checkpoint

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")


class Questions(TorchDispatchMode):
    """What was asked, how often."""

    def __init__(self):
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        index = args[1] if name.startswith("index") and len(args) > 1 else None
        by_mask = isinstance(index, (list, tuple)) and any(one is not None and one.dtype is torch.bool for one in index)
        one_value = (
            by_mask and name.startswith("index_put") and args[2].numel() == 1
        )  # ``masked_fill``, which asks nothing
        if (name in WAITING or (by_mask and not one_value)) and not _about_the_host():
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def _about_the_host() -> bool:
    """Megatron-Core compares states of the host's random generator, which are on the host also where there is a GPU."""
    return any(frame.filename.endswith("tensor_parallel/random.py") for frame in traceback.extract_stack())


@contextmanager
def stepping(overrides: list[str]) -> Iterator[DistillationStep]:
    """A step of a calibrated student."""
    session = Session.start(load_settings([*SMALL_RUN, *overrides]))
    try:
        student = session.calibrated_student()
        yield qad_step(session, student, teacher_of(session, student), divergence=divergence_of(session))
    finally:
        shutdown_parallel()


def batches_of() -> list[Batch]:
    """Four microbatches, some tokens left out."""
    tokens = torch.randint(515, (4, 2, 17), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 16)
    weights[0, :3] = 0
    return [Batch(row[:, :-1], row[:, 1:], weights) for row in tokens]


def questions(rank: int, world_size: int, overrides: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Of one step after the first: between its ends, and in all."""
    with stepping(overrides) as step:
        batches = batches_of()
        step(batches)
        within, plain = Questions(), DistillationStep._forward_backward

        def counted(self, *arguments, **options):
            with within:
                return plain(self, *arguments, **options)

        with Questions() as whole, patch.object(DistillationStep, "_forward_backward", counted):
            step(batches)
        return dict(within.asked), dict(whole.asked)


@pytest.mark.parametrize(
    ("ranks", "sizes", "loss"),
    [
        (1, [], "{forward_kl: 0.7, cross_entropy: 0.3}"),
        (2, ["parallel.tensor=2", "parallel.sequence=true"], "{forward_kl: 1.0}"),
    ],
)
def test_a_step_asks_at_its_ends_only(run_ranks, tmp_path, ranks, sizes, loss) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    overrides = [
        f"model={model}",
        f"output_dir={tmp_path / 'run'}",
        "quantization=nvfp4",
        f"distill.loss={loss}",
        *sizes,
    ]
    for within, whole in run_ranks(ranks, questions, overrides):
        assert within == {}
        assert sum(whole.values()) > 0, "the two ends ask, and are seen to"
