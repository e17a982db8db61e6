"""The whole journey on one GPU: NCCL groups, CUDA generators, Megatron's fusions, as a user starts it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megaqad.quantization import backend
from tests.models.checkpoints import make_checkpoint

SETTINGS = [
    *("data=random", "train.sequence_length=64", "train.micro_batch_size=2", "train.global_batch_size=4"),
    *("train.steps=4", "train.lr=1e-4", "evaluation.max_tokens=1024", "evaluation.training_tokens=512"),
    *("logging.wandb.mode=disabled", "checkpoint.every=2"),
]
BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= backend.LEAST_CAPABILITY


def megaqad(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "megaqad", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_recover(tmp_path, recompute):
    model = make_checkpoint("llama", tmp_path / "model", dtype=torch.bfloat16)
    megaqad("recover", f"model={model}", f"output_dir={tmp_path / 'run'}", *SETTINGS, f"train.recompute={recompute}")
    columns = json.loads((tmp_path / "run/report/recovery.json").read_text())
    assert columns["ptq"]["kl_to_teacher"] > 0
    assert json.loads((tmp_path / "run/verify.json").read_text())["passed"]
    assert torch.isfinite(losses(tmp_path / "run")).all()


def test_float32_on_the_gpu_trains_the_cpu_curve(tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    curves = []
    for device, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        run_dir = tmp_path / device
        arguments = ["distill", f"model={model}", f"output_dir={run_dir}", *SETTINGS, "runtime.dtype=float32"]
        arguments.append("quantization=nvfp4_weight_only")  # rounding of activations turns last bits into codes
        subprocess.run(
            [sys.executable, "-m", "megaqad", *map(str, arguments)],
            env={**os.environ, **environment},
            check=True,
        )
        curves.append(losses(run_dir))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not BLACKWELL, reason="no GPU with NVFP4 (compute capability 10.0)")
def test_distilling_on_transformer_engine_follows_the_emulated_curve(tmp_path):
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    model = make_checkpoint("llama_tied_scaled", tmp_path / "model", dtype=torch.bfloat16)
    curves = []
    for chosen in ("emulated", "transformer_engine"):
        run_dir = tmp_path / chosen
        megaqad("recover", f"model={model}", f"output_dir={run_dir}", *SETTINGS, f"quantization.backend={chosen}")
        assert json.loads((run_dir / "verify.json").read_text())["passed"]
        curves.append(losses(run_dir))
    torch.testing.assert_close(curves[0], curves[1], rtol=0.1, atol=0.0)
