"""`bench step` on a small model: every part of both steps, their floors and their memory."""

import json
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks.gpu import BARS, verdict
from benchmarks.step import PARTS
from megaqad.commands import bench as command
from megaqad.errors import UserError
from tests.models.checkpoints import make_checkpoint

SMALL = [
    "data=random",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.sequence_length=32",
    "quantization=nvfp4",
    "quantization.calibration_samples=4",
    "parallel.data=1",
]


def bench(rank, world_size, arguments, profile=False):
    """The rows of this rank."""
    from benchmarks.step import rows
    from megaqad.config import check_settings, load_settings
    from megaqad.runtime.ranks import shutdown_parallel

    settings = load_settings(["experiment=demo", *arguments])
    check_settings("bench step", settings)
    try:
        return json.loads(json.dumps(list(rows(settings, repeats=2, profile=profile))))
    finally:
        shutdown_parallel()


def test_rows_add_up(run_ranks, tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    arguments = [f"model={model}", f"output_dir={tmp_path / 'run'}", *SMALL, "parallel.pipeline=2"]
    rows, others = run_ranks(2, bench, arguments)
    assert others == [], "one rank speaks"
    by_part = {row["part"]: row for row in rows if "skipped" not in row}
    assert set(by_part) == {"step", *PARTS}
    step = by_part["step"]
    assert step["ratio"] > 0
    assert math.isclose(step["floor"], 4 / 3)
    assert step["plain_peak_tensor_bytes"] > 0
    assert step["qad_peak_tensor_bytes"] > 0
    assert by_part["teacher forward"]["plain_seconds"] < by_part["teacher forward"]["qad_seconds"]
    assert by_part["weight quantization"]["over_floor"] == by_part["weight quantization"]["over_plain_step"]
    for part in PARTS:
        assert by_part[part]["over_floor"] <= by_part[part]["over_plain_step"]
    assert not (tmp_path / "run").exists(), "a measurement leaves nothing behind"


def test_a_shape_without_a_model(run_ranks, tmp_path):
    """Random weights; rates, and the operations of each part, which take most of its time."""
    arguments = ["model=random:tiny", f"output_dir={tmp_path / 'run'}", *SMALL]
    [rows] = run_ranks(1, bench, arguments, True)
    step = rows[0]
    assert step["part"] == "step"
    tokens = 4 * 32
    assert math.isclose(step["qad_tokens_per_second"], tokens / step["qad_seconds"])
    layer = 2 * (256 * (8 + 2 * 4) * 32 + 256 * 256 + 3 * 256 * 768) + 4 * 8 * 32 * 16  # products; attention to half
    work = tokens * (4 * layer + 2 * 256 * 4096)
    assert math.isclose(step["qad_tflops"], 4 * work / step["qad_seconds"] / 1e12)
    assert step["qad_share_of_products"] > 0
    assert [row["skipped"] for row in rows if row.get("part") == "modelopt"], "no CUDA"
    assert math.isclose(step["hugging_face_over_plain"], step["hugging_face_seconds"] / step["plain_seconds"])
    said = [verdict(bar, rows)[1] for bar in BARS if bar.part == "step"]
    assert [line for line in said if "not measured" in line] == [line for line in said if "ModelOpt" in line]
    kernels = [row for row in rows if "profile" in row]
    assert {"teacher forward", "student forward", "loss", "backward"} <= {row["profile"] for row in kernels}
    products = sum(row["microseconds"] for row in kernels if row["kernel"] in ("aten::mm", "aten::addmm"))
    assert products > 0.05 * sum(row["microseconds"] for row in kernels)


def test_the_peers_step_trains(tmp_path):
    """ModelOpt's quantizer needs CUDA; the step around it does not."""
    from transformers import AutoModelForCausalLM

    from benchmarks.peers import distillation_step, fine_tuning_step
    from megaqad.data import Batch

    models = [make_checkpoint("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    teacher, student = (AutoModelForCausalLM.from_pretrained(model) for model in models)
    seen = []
    student.lm_head.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    tokens = torch.randint(515, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    batches = [Batch(one, one, torch.ones_like(one, dtype=torch.float32)) for one in tokens]
    before = student.lm_head.weight.detach().clone()
    distillation_step(teacher.requires_grad_(False), student, batches)()
    found = seen[-1]  # accumulated
    hidden = student.model(tokens.flatten(0, 1)).last_hidden_state
    target = teacher(tokens.flatten(0, 1)).logits
    gap = (hidden @ before.t()).softmax(-1) - target.softmax(-1)  # of the KL's gradient by logits
    torch.testing.assert_close(found, (gap.flatten(0, 1).t() @ hidden.flatten(0, 1)) / 64, rtol=1e-4, atol=1e-6)
    assert torch.equal(student.lm_head.weight, before)
    fine_tuning_step(student, batches)()
    gap = (hidden @ before.t()).softmax(-1) - F.one_hot(tokens.flatten(0, 1), 515)
    torch.testing.assert_close(seen[-1], (gap.flatten(0, 1).t() @ hidden.flatten(0, 1)) / 64, rtol=1e-4, atol=1e-6)


def test_an_installation_without_the_benchmarks_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.nvfp4", raising=False)
    with pytest.raises(UserError, match="bench nvfp4 needs the directory benchmarks/ of the source tree"):
        command.bench_nvfp4()
