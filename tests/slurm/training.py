"""The training that the Slurm tests run, and what it leaves to look at."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STEPS = 40
CHECKPOINT_EVERY = 4
OPTIONS = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=60")
SETTINGS = (
    "model=bundled",
    "data=random",
    "data.max_train_tokens=65536",
    "data.max_validation_tokens=4096",
    "runtime.dtype=float32",
    "parallel.tensor=2",
    "quantization.calibration_samples=8",
    "evaluation.max_tokens=2048",
    "logging.wandb.mode=disabled",
    f"train.steps={STEPS}",
    "train.lr=1e-4",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.sequence_length=64",
    f"checkpoint.every={CHECKPOINT_EVERY}",
)


class Run:
    """What a run has left in its directory so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self) -> list[str]:
        """Of metrics.jsonl, whole ones."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def steps(self) -> int:
        lines = self.lines()
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        pointer = self.folder / "checkpoints" / "latest"
        return int(pointer.read_text().strip().removeprefix("step_")) if pointer.exists() else 0

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, without what a clock measured."""
        rows = [json.loads(line) for line in self.lines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors of the last checkpoint: student, quantizers, FP32 main parameters, Adam's moments, generators."""
        directory = self.folder / "checkpoints" / f"step_{STEPS:08d}"
        return {
            f"{path.relative_to(directory)} {name}": tensor
            for path in sorted(directory.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }
