"""The gradients of a whole step equal those of the definition, differentiated by plain autograd on one rank.

What could be wrong otherwise: the scale of the hidden-state loss, which enters beside Megatron's schedule; the head's
gradient, which the loss puts into the main gradient itself, beside the embedding's where the two are tied.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaqad.config import Settings, load_settings
from megaqad.data.batch import Batch, flatten_tokens
from megaqad.models.causal_lm import CausalLM
from megaqad.recovery.session import Session
from megaqad.recovery.teaching import divergence_of, hidden_loss_of, teacher_of
from megaqad.runtime.ranks import shutdown_parallel
from tests.distillation.runs import SMALL_RUN, qad_step
from tests.losses.oracle import dense_cka, dense_kl, relative_error
from tests.models.checkpoints import make_checkpoint

KEEPS_GRADIENTS = ["quantization=none", "train.lr=0", "train.clip_grad=1e9"]
CASES = {
    "untied": ("qwen3", []),
    "tied": ("qwen2", []),
    "cosine": ("qwen3", ["distill.hidden.weight=0.3", "distill.hidden.layers=[0,2]"]),
    "cosine, recomputed": ("qwen3", ["distill.hidden.weight=0.3", "train.recompute=true"]),
    "cka": ("qwen3", ["distill.hidden.weight=4", "distill.hidden.kind=cka", "distill.hidden.layers=[1]"]),
}


def batches(vocabulary: int) -> list[Batch]:
    """Two microbatches with weights of every kind."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(vocabulary, (2, 3, 17), generator=draw)
    weights = torch.rand(2, 3, 16, generator=draw) + 0.5
    weights[0, :, ::3] = 0
    return [Batch(row[:, :-1], row[:, 1:], weight) for row, weight in zip(tokens, weights, strict=True)]


def layer_outputs(model: CausalLM, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """Last hidden states and every layer's output, [s * b, h]."""
    kept: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda layer, _, output, index=index: kept.update({index: output.flatten(0, 1)}))
        for index, layer in enumerate(model.layers)
    ]
    hidden = model(tokens).flatten(0, 1)
    for hook in hooks:
        hook.remove()
    return hidden, kept


def defined_loss(settings: Settings, student: CausalLM, teacher: CausalLM, given: list[Batch]) -> Tensor:
    """Mean over the tokens by their weights, by the definitions."""
    hidden_settings, total = settings.distill.hidden, torch.zeros(())
    for batch in given:
        weights = flatten_tokens(batch.weights)
        ours, our_layers = layer_outputs(student, batch.tokens)
        with torch.no_grad():
            theirs, their_layers = layer_outputs(teacher, batch.tokens)
        logits, teacher_logits = ours @ student.head_weight().t(), theirs @ teacher.head_weight().t()
        total = total + (weights * dense_kl(logits.double(), teacher_logits.double(), 1.0)).sum()
        for index in hidden_settings.layers or range(len(our_layers)) if hidden_settings.weight else ():
            pair = our_layers[index].double(), their_layers[index].double()
            if hidden_settings.kind == "cosine":
                value = (weights * (1 - F.cosine_similarity(*pair, dim=-1))).sum()
            else:
                value = weights.sum() * (1 - dense_cka(*pair, weights.double()))
            total = total + hidden_settings.weight * value
    return total / sum(batch.weights.sum() for batch in given)


def errors_of_a_step(rank: int, world_size: int, overrides: list[str]) -> dict[str, Any]:
    """Relative error of the step's loss and of every parameter's gradient."""
    settings = load_settings([*SMALL_RUN, *KEEPS_GRADIENTS, *overrides])
    session = Session.start(settings)
    try:
        student, plain = session.original_student(), session.original_student()
        teacher = teacher_of(session, student)
        hidden = hidden_loss_of(session, student, teacher.model)
        step = qad_step(session, student, teacher, divergence=divergence_of(session), hidden=hidden)
        given = batches(session.architecture.vocab_size)
        result = step(given)
        assert result.fault is None
        plain.last.recompute = False
        loss = defined_loss(settings, plain.last, teacher.model.last, given)
        loss.backward()
        found = dict(student.last.named_parameters())
        errors = {name: relative_error(found[name].main_grad, one.grad) for name, one in plain.last.named_parameters()}
        return {"loss": abs(result.loss / float(loss) - 1), **errors}
    finally:
        shutdown_parallel()


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_step(run_ranks, tmp_path, case):
    family, overrides = CASES[case]
    model = make_checkpoint(family, tmp_path / "model")
    teacher = make_checkpoint(family, tmp_path / "teacher", seed=3)
    arguments = [f"model={model}", f"distill.teacher={teacher}", f"output_dir={tmp_path / 'run'}", *overrides]
    errors = run_ranks(1, errors_of_a_step, arguments)[0]
    assert len(errors) > 20
    for name, error in errors.items():
        assert error <= 1e-4, name
