"""The errors of the KL losses on trained models: the bundled teacher and what NVFP4 makes of it, on held-out text.

Random logits could be of an unlucky size. Here everything is a real model's, BF16 throughout: quantizing only the
attention's output projections gives a KL of 5e-3 per token, where QAD of a large model works; quantizing all layers of
a model this small gives 3.5e-2.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from megaqad.config import load_settings
from megaqad.distillation.forward import forward_hidden
from megaqad.recovery.session import Session
from megaqad.runtime.ranks import shutdown_parallel

from .contestants import Problem
from .errors import errors

RECIPES = {"o_proj": ["*.o_proj"], "all layers": ["*"]}
TOKENS = 512
TEXT = argparse.__file__
"""Some text of the kind that the teacher was trained on, which every machine has."""


def bench_trained() -> Iterator[dict[str, Any]]:
    """Rows like those of ``operation="errors"`` of ``kl.bench_kl``, with what was quantized under ``quantized``.

    Joins a process group of this rank alone, and on CPU leaves Megatron-Core's device layer on: import ModelOpt and
    take times before.
    """
    for name, include in RECIPES.items():
        for row in errors(trained_problem(include)):
            yield {"bench": "kl", "dtype": "bfloat16", "quantized": name} | row


@torch.no_grad()
def trained_problem(include: list[str]) -> Problem:
    """Last hidden states and heads of the bundled teacher and of its post-training-quantized copy, ``TOKENS`` tokens.

    Args:
        include: patterns of the modules to quantize, weights only.
    """
    settings = load_settings(
        [
            "experiment=demo",
            "output_dir=unused",
            f"data={TEXT}",
            "quantization=nvfp4_weight_only",
            f"quantization.include={include}",
            "runtime.dtype=bfloat16",
        ]
    )
    session = Session.start(settings)
    try:
        student, teacher = session.calibrated_student(), session.teacher
        batches = session.data.validation.evaluation_batches(TOKENS // 256, 0, 1, TOKENS)
        tokens = [batches[0].tokens.to(session.ranks.device)]
        hidden_s, hidden_t = (forward_hidden(model, tokens)[0].flatten(0, 1) for model in (student, teacher))
        heads = [model.last.head_weight().clone() for model in (student, teacher)]
    finally:
        shutdown_parallel()
    weights = torch.full((len(hidden_s),), 1 / len(hidden_s), device=hidden_s.device)
    return Problem(hidden_s, heads[0], hidden_t, heads[1], weights)
