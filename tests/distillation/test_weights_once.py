"""Weights are quantized once per optimizer step: not once per microbatch, not in backward, not when recomputing.

Two observations of real steps. What a layer multiplies with is one tensor from the first microbatch to the last, and
another after the update. And nothing else reads the weights meanwhile: with NaN in place of those that are trained from
before the first forward, the teacher's, until after the last backward, the same bits are trained. Also when the student
is its own teacher, whose pass puts the originals in their place for a while.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megaqad.config import load_settings
from megaqad.data.batch import Batch
from megaqad.models.model import Model
from megaqad.quantization.layers import QuantizedLinear
from megaqad.quantization.model import weight_sites
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import divergence_of, teacher_of
from megaqad.runtime.ranks import shutdown_parallel
from megaqad.training.freezing import freeze
from tests.distillation.runs import SMALL_RUN, qad_step
from tests.models.checkpoints import make_checkpoint

STEPS, MICRO_BATCHES = 2, 4
CASES = {
    "recomputed in BF16": (1, ["train.recompute=true", "runtime.dtype=bfloat16"]),
    "tensor 2 x pipeline 2, interleaved": (
        4,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
    "its own teacher, tensor 2": (
        2,
        ["distill.teacher=self", "train.trainable=[lm_head,'model.layers.[12].*']", "parallel.tensor=2"],
    ),
}


def batches(vocabulary: int, step: int) -> list[Batch]:
    tokens = torch.randint(vocabulary, (MICRO_BATCHES, 2, 17), generator=torch.Generator().manual_seed(step))
    return [Batch(row[:, :-1], row[:, 1:], torch.ones(2, 16)) for row in tokens]


def rounded_weights(student: Model) -> list[Tensor]:
    """The parameters that are only multiplied with after rounding, of those that are trained: of the linear layers and
    of the head."""
    linears = [layer.weight for layer in weight_sites(student) if isinstance(layer, QuantizedLinear)]
    heads = [chunk.output_layer.weight for chunk in student.chunks if chunk.post_process]
    return [weight for weight in linears + heads if weight.requires_grad]


@torch.no_grad()
def hide_until_the_last_gradient(student: Model) -> None:
    """NaN in place of the weights; the schedule gives them back when all its backward passes are done."""
    weights = rounded_weights(student)
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.fill_(torch.nan)
    config = student.chunks[0].config
    finish = config.finalize_model_grads_func

    @torch.no_grad()
    def restore_and_finish(*arguments: Any, **options: Any) -> None:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
        config.finalize_model_grads_func = finish
        finish(*arguments, **options)

    config.finalize_model_grads_func = restore_and_finish


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    parameters: list[Tensor]
    """Of this rank's first chunk."""
    wrong: list[str]
    """Layers that have multiplied with more tensors, or with fewer, than one a step."""


def train(rank: int, world_size: int, overrides: list[str]) -> list[Trained]:
    """With the weights hidden, and as always."""
    session = Session.start(
        load_settings([*SMALL_RUN, "quantization=nvfp4", "quantization.exclude=[]", "train.warmup_steps=0", *overrides])
    )
    try:
        return [train_one(session, hides) for hides in (True, False)]
    finally:
        shutdown_parallel()


def train_one(session: Session, hides: bool) -> Trained:
    student = session.calibrated_student()
    freeze(student, session.settings.train.trainable)
    step = qad_step(session, student, teacher_of(session, student), divergence=divergence_of(session))
    layers = weight_sites(student)
    used: list[list[Tensor]] = [[] for _ in layers]  # the tensors themselves: an address may be used again
    for layer, found in zip(layers, used, strict=True):
        layer.register_forward_pre_hook(lambda one, _, found=found: found.append(one.quantized_weight))
    losses, wrong = [], []
    for index in range(STEPS):
        if hides:
            assert rounded_weights(student), "this rank would show nothing"
            hide_until_the_last_gradient(student)
        losses.append(step(batches(session.architecture.vocab_size, index)).loss)
        for layer, found in zip(layers, used, strict=True):
            if len(found) < MICRO_BATCHES * (index + 1) or len({id(one) for one in found}) != index + 1:
                wrong.append(layer.module_names[0])
    return Trained(losses, [one.detach().clone() for one in student.chunks[0].parameters()], wrong)


@pytest.mark.parametrize("case", CASES)
def test_once_per_optimizer_step(run_ranks, tmp_path, case):
    ranks, sizes = CASES[case]
    model = make_checkpoint("qwen3", tmp_path / "model")
    for hidden, plain in run_ranks(ranks, train, [f"model={model}", f"output_dir={tmp_path / 'run'}", *sizes]):
        assert hidden.wrong == plain.wrong == []
        assert hidden.losses == plain.losses
        assert 0 < hidden.losses[-1] < 100
        assert all(torch.equal(one, other) for one, other in zip(hidden.parameters, plain.parameters, strict=True))
