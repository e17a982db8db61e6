"""Only blocks and families spell the names of tensors; everything else has them from a model's description."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import megaqad
from megaqad.models.families import describe_model
from tests.families.checkpoints import CASES, settings

PACKAGE = Path(megaqad.__file__).parent
MAY_SPELL = ("models/blocks", "models/families", "export/client")
"""The last reads exports as a client does, who has no description."""
DEFAULTS = {("quantization/settings.py", "lm_head"), ("quantization/backend.py", "lm_head")}
"""Of a setting that users write as a module's name."""


def strings(tree: ast.Module) -> Iterator[str]:
    """Every string of a module that is no documentation."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            yield node.value


def test_no_other_file_spells_a_tensor_name(tmp_path: Path) -> None:
    architectures = []
    for case in CASES:
        (tmp_path / "config.json").write_text(json.dumps(settings(case)))
        architectures.append(describe_model(tmp_path))
    names = {
        part for one in architectures for name in one.tensors for part in name.split(".") if "_" in part and part != "_"
    }
    assert {"q_proj", "gate_up_proj", "embed_tokens", "lm_head", "self_attn"} <= names
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        if not str(path.relative_to(PACKAGE)).startswith(MAY_SPELL)
        for text in strings(ast.parse(path.read_text()))
        for name in names
        if name in text
    }
    assert found == DEFAULTS
