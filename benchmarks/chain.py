"""What the chain takes on a model of 1.2 billion parameters: minutes and memory of quantize, export and verify.

    python -m benchmarks.chain llama parallel.tensor=2
    python -m benchmarks.chain qwen3_moe parallel.expert=2 parallel.data=2

The model is random, as neither time nor memory depends on its weights. Each command runs as a user would start it; one
JSON line each, with the settings that it was given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megaqad.config.settings import BUNDLED_TEACHER

COMMON = {"max_position_embeddings": 4096, "pad_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {  # Qwen3 30B A3B, narrower and with fewer layers and experts
        "hidden_size": 1024,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
SETTINGS = ("data=stdlib", "train.sequence_length=256", "train.global_batch_size=8", "train.micro_batch_size=2")
SHORT = ("quantization.calibration_samples=8", "evaluation.max_tokens=2048", "report.sensitivity=false")


def write_random_checkpoint(kind: str, folder: Path) -> int:
    """A BF16 checkpoint with the bundled tokenizer; how many parameters it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_TEACHER / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def rows(kind: str, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One for each command: ``seconds`` of the whole process, ``peak_resident_bytes`` of the largest one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Linux counts what a process held when it started another as the other's own, so this one stays small.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            size = pool.submit(write_random_checkpoint, kind, folder / "model").result()
        own = [f"model={folder / 'model'}", f"output_dir={folder / 'run'}", *SETTINGS, *SHORT, *overrides]
        for command in ("quantize", "export", "verify"):
            seconds, peak = _run([sys.executable, "-m", "megaqad", command, *own])
            yield {
                "bench": "chain",
                "model": kind,
                "parameters": size,
                "command": command,
                "settings": [*SETTINGS, *SHORT, *overrides],
                "seconds": round(seconds, 1),
                "peak_resident_bytes": peak,
            }


def _run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most bytes resident in the command's process or in one that it started; pages of mapped files
    count."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("settings", nargs="*", help="key=value, as for megaqad")
    arguments = parser.parse_args()
    for row in rows(arguments.model, arguments.settings):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
