"""What saving costs the training thread, with the demo's model, layout and batch."""

import json
import re
import statistics

from megaqad.config import CheckpointSettings
from tests.faults.conftest import NOTES

STEPS, EVERY = 12, 4
WAITED = re.compile(r"(\d+) checkpoints written; training waited ([\d.]+) s")


def test_saving_costs_little_of_a_step(server, tmp_path):
    """All that the training thread does for a checkpoint, its last wait included, over the steps between two."""
    run_dir = tmp_path / "run"
    overrides = ["experiment=demo", "parallel.data=2", "data=random", f"output_dir={run_dir}", f"train.steps={STEPS}"]
    rarely = ["evaluation.every=0", "logging.wandb.mode=disabled", f"checkpoint.every={EVERY}"]
    command = server.start(tmp_path / "command", ["distill", *overrides, *rarely])
    assert command.wait() == 0, command.output
    said = WAITED.search(command.output)
    assert said is not None, command.output
    per_save = float(said.group(2)) / int(said.group(1))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(row["seconds"] for row in rows)
    interval = CheckpointSettings().every
    share = per_save / (interval * step)
    assert share < 0.05
    NOTES.append(
        f"saving, on the demo: the training thread waits {per_save:.2f} s per checkpoint, {per_save / step:.0%} of one "
        f"step, {share:.2%} of the {interval} steps between two"
    )
