"""What the stages hold in memory: for each byte of the model's shard so many, whatever the rest of the process takes.

The rest (libraries, a few batches, a piece of the files) is the same for a small and a large model of equal widths, so
the difference of two runs is the model's part.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaqad.config.settings import BUNDLED_TEACHER
from tests.models.checkpoints import make_checkpoint

LAYERS = (2, 16)
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
SETTINGS = ("data=stdlib", "runtime.dtype=float32", "train.sequence_length=64", "train.global_batch_size=2")
SHORT = ("quantization.calibration_samples=1", "evaluation.max_tokens=1024", "report.sensitivity=false")
MOST = {"quantize": 2.15, "export": 1.2}
"""Times the shard. Student and teacher; the student."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""What is freed goes back to the system: what the code holds is measured, not what the allocator keeps for later."""


def shard_bytes(model: Path) -> int:
    return 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))  # BF16 on the disk


@pytest.mark.slow
def test_a_model_takes_its_weights_and_little_more(tmp_path):
    shards, peaks = [], []
    for layers in LAYERS:
        folder = tmp_path / str(layers)
        model = make_checkpoint(
            "llama", folder / "model", dtype=torch.bfloat16, vocab_size=2048, num_hidden_layers=layers, **WIDTHS
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUNDLED_TEACHER / name, model)
        shards.append(shard_bytes(model))
        peaks.append({command: peak(command, model, folder / "run") for command in MOST})
    more = shards[1] - shards[0]
    shares = {command: (peaks[1][command] - peaks[0][command]) / more for command in MOST}
    assert {command: share for command, share in shares.items() if share > MOST[command]} == {}, (shares, peaks)


def peak(command: str, model: Path, output: Path) -> int:
    arguments = [command, f"model={model}", f"output_dir={output}", *SETTINGS, *SHORT]
    command_line = [sys.executable, "-m", "tests.resident", *arguments]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.rpartition("peak_resident ")[2])
