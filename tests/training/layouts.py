"""A property of configurations: whatever is accepted trains and resumes, whatever is not is refused in one line."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event
from hypothesis import strategies as st

from megaqad.config import check_settings, load_settings
from megaqad.errors import UserError
from tests.faults.runs import SMALL, outcome
from tests.models.checkpoints import make_checkpoint
from tests.ranks import run_ranks
from tests.training.runs import distill

MODELS = ("llama", "llama_tied_scaled", "llama_three_groups", "qwen3")
MOST_RANKS = 4
MADE: dict[str, Path] = {}
"""The checkpoints of ``MODELS`` that have been needed."""

Configuration = tuple[str, tuple[str, ...], int]
"""(model, overrides, ranks that the layout asks for)."""

SIZES = [
    *((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4)),
    *((3, 1, 1), (1, 3, 1), (1, 1, 3)),
]
"""(tensor, pipeline, data): everything that fits the test's ranks, whether it fits the model or not."""


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """About half of them are accepted."""

    def usually(value: Any, *others: Any) -> Any:
        return draw(st.sampled_from([value] * 6 + list(others)))

    tensor, pipeline, data = draw(st.sampled_from(SIZES))
    micro_batch = draw(st.sampled_from([1, 2]))
    share = micro_batch * data * usually(pipeline, 1)
    overrides = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.data": data,
        "parallel.virtual_pipeline": draw(st.sampled_from([1, 2] if pipeline > 1 else [1, 1, 1, 2])),
        "parallel.sequence": str(draw(st.booleans()) if tensor > 1 else usually(False, True)).lower(),
        "parallel.context": usually(1, 2),
        "parallel.expert": usually(1, 2),
        "train.micro_batch_size": micro_batch,
        "train.global_batch_size": usually(share * draw(st.sampled_from([1, 2])), 5),
        "train.sequence_length": usually(24, 16, 33),
        "train.recompute": str(draw(st.booleans())).lower(),
        "runtime.dtype": draw(st.sampled_from(["float32", "bfloat16"])),
    }
    ranks = tensor * pipeline * data * int(overrides["parallel.context"])
    return draw(st.sampled_from(MODELS)), tuple(f"{name}={value}" for name, value in overrides.items()), ranks


def check(configuration: Configuration, folders: pytest.TempPathFactory) -> None:
    """The property, for one configuration."""
    name, overrides, ranks = configuration
    if name not in MADE:
        MADE[name] = make_checkpoint(name, folders.mktemp(name))
    run_dir = folders.getbasetemp() / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    arguments = [
        *(f"model={MADE[name]}", f"output_dir={run_dir}", *SMALL),
        *("train.steps=2", "train.warmup_steps=0", "checkpoint.every=1", "evaluation.every=0"),
        *("data.max_train_tokens=2000", "quantization.calibration_samples=2"),
        *overrides,
    ]
    try:
        check_settings("distill", load_settings(arguments))
    except UserError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        event("refused")
        assert len(refusal.splitlines()) == 1
        assert not run_dir.exists()
        return
    if ranks > MOST_RANKS:
        event("too large for this test")
        return
    event(f"trained on {ranks} ranks")
    assert run_ranks(ranks, distill, arguments) == [None] * ranks
    whole = outcome(run_dir, steps=2)
    assert [row["step"] for row in whole.metrics] == [1, 2]
    shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    assert run_ranks(ranks, distill, arguments) == [None] * ranks
    assert outcome(run_dir, steps=2) == whole
