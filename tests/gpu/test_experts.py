"""Experts on a GPU: PyTorch's grouped product is the product of one expert after the other, and a model trains."""

import json

import pytest
import torch
from torch import Tensor

from megaqad.models.blocks.grouped import grouped_product
from tests.gpu.test_journey import SETTINGS, losses, megaqad
from tests.models.test_experts import COMMON, FAMILIES


def one_after_the_other(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    parts = zip(rows.split(counts), weight, strict=True)
    return torch.cat([part @ matrix.t() for part, matrix in parts])


@pytest.mark.parametrize("counts", [[5, 0, 130, 1], [0, 0, 0, 64], [17, 17, 17, 17]])
def test_the_grouped_product(counts):
    draw = torch.Generator(device="cuda").manual_seed(0)
    rows, weight = (
        torch.randn(shape, device="cuda", generator=draw).bfloat16() for shape in ((sum(counts), 64), (4, 96, 64))
    )
    slope = torch.randn(sum(counts), 96, device="cuda", generator=draw).bfloat16()
    results = []
    for product in (grouped_product, one_after_the_other):
        inputs = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        output = product(*inputs, counts)
        output.backward(slope)
        results.append([output.detach(), *(one.grad for one in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 5e-3 * theirs.float().norm()


def test_recover_with_experts(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3_moe", **COMMON | FAMILIES["qwen3_moe"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    megaqad("recover", f"model={tmp_path / 'model'}", f"output_dir={tmp_path / 'run'}", *SETTINGS)
    assert json.loads((tmp_path / "run/verify.json").read_text())["passed"]
    assert torch.isfinite(losses(tmp_path / "run")).all()
