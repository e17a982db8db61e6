"""The output head's gradient, which the loss puts into Megatron-Core's main gradient, and the hidden states'.

Quantized, or tied to the embedding (both at once is refused). The truth is dense autograd on one rank, with rounding as
``x + (round(x) - x).detach()``. The layers below are not rounded. Vocabularies are odd, so shards are uneven.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megaqad.config import load_settings
from megaqad.data.batch import flatten_tokens
from megaqad.nvfp4 import fake_quantize, tensor_amax
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import teacher_of
from megaqad.runtime.ranks import shutdown_parallel
from tests.distillation.runs import SMALL_RUN, qad_step
from tests.distillation.test_gradients import KEEPS_GRADIENTS, batches
from tests.losses.oracle import dense_kl, relative_error
from tests.models.checkpoints import make_checkpoint

ONE, TENSOR_2 = (1, []), (2, ["parallel.tensor=2"])
SEQUENCE_AND_STAGES = (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"])
CASES = {
    "quantized": (
        "qwen3",
        ["quantization=nvfp4", "quantization.include=[lm_head]", "quantization.exclude=[]"],
        [ONE, TENSOR_2, SEQUENCE_AND_STAGES],
    ),
    "tied": ("qwen2", ["quantization=none"], [TENSOR_2, SEQUENCE_AND_STAGES]),
}


@dataclass(frozen=True)
class Gradients:
    """On one rank of the last stage; of the mean over tokens."""

    amax: Tensor | None
    """Largest hidden state seen in calibration; None for a head that is not quantized."""
    head: Tensor
    """[real rows, h]"""
    hidden: list[Tensor]
    """Per microbatch [s(/tp), b, h]; of the sum over tokens."""
    norm: Tensor
    """Of the final norm."""


def trained_gradients(rank: int, world_size: int, overrides: list[str]) -> Gradients | None:
    """Of one step, as Megatron-Core's optimizer would get them."""
    settings = load_settings([*SMALL_RUN, *KEEPS_GRADIENTS, *overrides])
    session = Session.start(settings)
    try:
        student = session.calibrated_student()
        step = qad_step(session, student, teacher_of(session, student))
        last, hidden = student.last, []

        def keep_gradient(norm: torch.nn.Module, arguments: object, output: Tensor) -> None:
            output.register_hook(lambda gradient: hidden.append(gradient.clone()))

        if last.final_norm is not None:
            last.final_norm.register_forward_hook(keep_gradient)
        assert step(batches(session.architecture.vocab_size)).fault is None
        if not session.ranks.is_last_stage:
            return None
        amax = None if last.head_quantizer is None else last.head_quantizer.input_amax
        return Gradients(amax, last.head_main_grad().clone(), hidden, last.final_norm.weight.main_grad.clone())
    finally:
        shutdown_parallel()


def rounded(x: Tensor, amax: Tensor) -> Tensor:
    """FP64: the nearest NVFP4 numbers of FP32 ``x``, with the gradient of ``x``."""
    return x.double() + (fake_quantize(x.detach(), amax).double() - x.double()).detach()


def true_gradients(rank: int, world_size: int, overrides: list[str], amax: Tensor | None) -> Gradients:
    settings = load_settings([*SMALL_RUN, *KEEPS_GRADIENTS, *overrides])
    session = Session.start(settings)
    try:
        student, teacher = session.original_student().last, session.frozen(settings.teacher_dir).last  # quantizers off
        weight = student.original_head()
        assert torch.equal(weight, weight.bfloat16().float()) or amax is None, "is rounded to BF16 first"
        kept, total = [], torch.zeros((), dtype=torch.float64)
        given = batches(session.architecture.vocab_size)
        for batch in given:
            hidden = student(batch.tokens)
            hidden.retain_grad()
            kept.append(hidden)
            head = weight.double() if amax is None else rounded(weight, tensor_amax(weight.detach()))
            seen = (hidden.double() if amax is None else rounded(hidden, amax)).flatten(0, 1)
            with torch.no_grad():
                teacher_logits = teacher(batch.tokens).flatten(0, 1) @ teacher.head_weight().t()
            total = total + (flatten_tokens(batch.weights) * dense_kl(seen @ head.t(), teacher_logits)).sum()
        total.backward()
        tokens = sum(batch.weights.sum() for batch in given)
        return Gradients(
            None,
            weight.grad / tokens,
            [hidden.grad for hidden in kept],
            student.final_norm.weight.grad / tokens,
        )
    finally:
        shutdown_parallel()


@pytest.mark.parametrize("case", CASES)
def test_head_and_hidden_gradients(run_ranks, tmp_path, case):
    family, overrides, layouts = CASES[case]
    model = make_checkpoint(family, tmp_path / "model", dtype=torch.bfloat16)
    teacher = make_checkpoint(family, tmp_path / "teacher", seed=3)
    arguments = [f"model={model}", f"distill.teacher={teacher}", f"output_dir={tmp_path / 'run'}", *overrides]
    truth = None
    for ranks, sizes in layouts:
        found = [one for one in run_ranks(ranks, trained_gradients, [*arguments, *sizes]) if one is not None]
        truth = truth or run_ranks(1, true_gradients, arguments, found[0].amax)[0]
        assert relative_error(torch.cat([one.head for one in found]), truth.head) <= 1e-4, sizes
        for index, expected in enumerate(truth.hidden):
            parts = [one.hidden[index] for one in found]
            for part in [torch.cat(parts)] if "parallel.sequence=true" in sizes else parts:
                assert relative_error(part, expected) <= 1e-4, sizes
        for one in found:
            assert relative_error(one.norm, truth.norm) <= 1e-4, sizes
