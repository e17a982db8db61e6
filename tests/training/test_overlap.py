"""Gradients reduced while others are still computed: what is trained is the same."""

from functools import partial
from unittest.mock import patch

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from transformers import AutoConfig, AutoModelForCausalLM

from megaqad.training.logs import read_metrics
from megaqad.training.optimizer import wrap_for_training
from tests.faults.runs import SMALL
from tests.models.checkpoints import make_checkpoint
from tests.models.test_experts import COMMON, FAMILIES
from tests.training.runs import distill, losses, whole_tensors

STEPS = 4
LAYOUTS = {
    "data 2": (2, ["parallel.data=2"]),
    "data 2, several microbatches, BF16": (
        2,
        ["parallel.data=2", "train.micro_batch_size=1", "runtime.dtype=bfloat16"],
    ),
    "data 2 x tensor 2": (4, ["parallel.data=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "data 2 x pipeline 2, interleaved": (4, ["parallel.data=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "data 2 x expert 2": (2, ["parallel.data=2", "parallel.expert=2"]),
    "some frozen": (2, ["parallel.data=2", "train.trainable=[lm_head,'model.layers.[12].*']"]),
}

DENSE = [layout for layout in LAYOUTS if "expert" not in layout]


def distill_overlapping(rank, world_size, overrides):
    """In small buckets, so that there is something to overlap; on CUDA they are of 40 million parameters."""
    buckets = partial(DistributedDataParallelConfig, bucket_size=20_000)
    with (
        patch("megaqad.training.optimizer.DistributedDataParallelConfig", buckets),
        patch("megaqad.recovery.stages.wrap_for_training", partial(wrap_for_training, overlap=True)),
    ):
        return distill(rank, world_size, overrides)


def model_of(case, folder):
    if case != "qwen3_moe":
        return make_checkpoint(case, folder)
    config = AutoConfig.for_model(case, **COMMON | FAMILIES[case])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("data 2", "llama"),
        ("data 2 x pipeline 2, interleaved", "qwen2"),  # whose head is its embedding
        *(pytest.param(layout, case, marks=pytest.mark.slow) for layout in DENSE for case in ("llama", "qwen2")),
        pytest.param("data 2 x expert 2", "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_the_same_is_trained(run_ranks, tmp_path, layout, case):
    ranks, sizes = LAYOUTS[layout]
    if layout == "some frozen" and case == "qwen2":
        sizes = ["parallel.data=2", "train.trainable=['model.layers.[12].*']"]
    model = model_of(case, tmp_path / "model")
    runs = []
    for name, train in (("plain", distill), ("overlapping", distill_overlapping)):
        arguments = [f"model={model}", f"output_dir={tmp_path / name}", *SMALL, f"train.steps={STEPS}", *sizes]
        assert run_ranks(ranks, train, arguments) == [None] * ranks
        runs.append(tmp_path / name)
    plain, found = (losses(read_metrics(run / "metrics.jsonl")).tolist() for run in runs)
    assert found == pytest.approx(plain, rel=1e-6)
    trained = [whole_tensors(run / "checkpoints" / f"step_{STEPS:08d}") for run in runs]
    assert trained[0].keys() == trained[1].keys()
    for name, one in trained[0].items():  # other buckets, other shards, other sums within the gradient's norm
        other = trained[1][name]
        rows = min(len(one), len(other)) if one.dim() else 0
        ours, theirs = (tensor[:rows].float() if rows else tensor.float() for tensor in (one, other))  # without padding
        assert (ours - theirs).norm() <= 1e-4 * ours.norm(), name
