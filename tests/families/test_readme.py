"""README, "Adding a family": its file is all that a family needs, and its two commands find out whether it is right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megaqad.errors import UserError
from megaqad.models.families import describe_model, families
from megaqad.runtime.ranks import ParallelSizes
from tests.families.checkpoints import (
    SIZES,
    random_tokens,
    randomize,
    relative_error,
    save,
    transformers_logits,
    transformers_model,
)
from tests.families.runs import logits_of_new_family
from tests.models.megatron_runs import whole_logits
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]
SECTION = (REPOSITORY / "README.md").read_text().split("\n## Adding a family\n")[1].split("\n## ")[0]
CODE, COMMANDS = re.findall(r"```(?:python)?\n(.*?)```", SECTION, re.DOTALL)
CONFIG = {**SIZES, "model_type": "arcee", "architectures": ["ArceeForCausalLM"], "mlp_bias": True}
RUN = """
import os, shlex, sys
import megaqad.commands.export, megaqad.commands.verify
from pathlib import Path
from megaqad.cli import main
from tests.families.runs import import_file
import_file(Path(sys.argv[1]))
codes = []
for line in sys.argv[2:]:
    child = os.fork()
    if not child:
        code = main(shlex.split(line))
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*codes)
"""
"""Arguments: the family's file, the commands; what is imported once serves all of them."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformers_model(CONFIG)
    randomize(model)
    return save(model, CONFIG, tmp_path_factory.mktemp("arcee"))


@pytest.fixture
def family_file(tmp_path: Path) -> Path:
    path = tmp_path / "arcee.py"
    path.write_text(CODE)
    return path


def test_the_example_is_no_family_yet(checkpoint: Path) -> None:
    """Otherwise it would test nothing; take another then."""
    assert "arcee" not in families()
    with pytest.raises(UserError, match=r'ArceeForCausalLM is not supported.*"Adding a family"'):
        describe_model(checkpoint)
    assert CODE.count("\n") < 40


@pytest.mark.parametrize("sizes", [ParallelSizes(), ParallelSizes(tensor=2, pipeline=2)], ids=str)
def test_the_example_computes_what_transformers_computes(
    sizes: ParallelSizes, checkpoint: Path, family_file: Path
) -> None:
    tokens = random_tokens(SIZES["vocab_size"])
    arguments = (family_file, checkpoint, sizes, tokens)
    logits = whole_logits(run_ranks(sizes.model_ranks, logits_of_new_family, *arguments))
    assert relative_error(logits, transformers_logits(checkpoint, tokens)) < 1e-5


@pytest.mark.parametrize(
    ("spoilt", "code", "said"),
    [("gated=False", 0, "relative error"), ('gated=False, activation="silu"', 2, "does not compute")],
)
def test_the_two_commands_check_it(
    spoilt: str, code: int, said: str, checkpoint: Path, family_file: Path, tmp_path: Path
) -> None:
    family_file.write_text(CODE.replace("gated=False", spoilt))
    lines = COMMANDS.replace("<checkpoint>", str(checkpoint)).replace("runs/check", str(tmp_path / "check"))
    commands = [line.removeprefix("megaqad ") for line in lines.strip().splitlines()]
    arguments = [sys.executable, "-W", "ignore", "-c", RUN, str(family_file), *commands]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"0 {code}"
    assert said in done.stdout + done.stderr
