"""README, "Recover your own model": the Python example runs as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megaqad import recovery
from megaqad.errors import UserError

REPOSITORY = Path(__file__).parents[2]
SECTION = (REPOSITORY / "README.md").read_text().split("\n## Recover your own model\n")[1].split("\n## ")[0]
CODE = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL).group(1)


def test_the_example(tmp_path):
    assert CODE.count("\n") <= 10
    smaller = CODE.replace('"train.steps=20"', '"train.steps=2", "evaluation.max_tokens=1024"')
    assert smaller != CODE
    done = subprocess.run(
        [sys.executable, "-c", smaller],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PTQ: KL to the teacher 0.0" in done.stdout
    assert "QAD: KL to the teacher 0.0" in done.stdout
    run = tmp_path / "runs" / "python"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert f"QAD: KL to the teacher {evaluation['kl_to_teacher']:.5f}" in done.stdout
    assert json.loads((run / "verify.json").read_text())["passed"]
    assert json.loads((run / "run.json").read_text())["kind"] == "distillation"
    assert (run / "export" / "config.json").is_file()


def test_a_layout_of_several_ranks_needs_them(tmp_path):
    with pytest.raises(UserError, match=r"this layout needs 2 ranks .*`torchrun --nproc-per-node 2"):
        recovery.start(["experiment=demo", "parallel.data=2", f"output_dir={tmp_path}"])
