"""Any config.json is read to the model that transformers makes of it, or refused in one line that says why."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from torch import nn

from megaqad.errors import UserError
from megaqad.models.checks import check_checkpoint, check_layout
from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes
from tests.families.checkpoints import SIZES, random_tokens, randomize, relative_error, save, transformers_model
from tests.families.configs import POSITIONS, configs
from tests.models.megatron_runs import local_logits, whole_logits
from tests.ranks import run_ranks

DELIBERATE = re.compile(
    r"partial_rotary_factor=|hidden_act=|softcapping=|use_bidirectional_attention=True|is_causal=false|not finite"
    r"|is not a multiple of num_attention_heads|sliding_attention without a window|layer_types has 'chunked_attention'"
    r"|must be a positive integer|architecture .* is not supported"
)
"""What may be refused though transformers computes something: other readers take it for something else, or a block is
missing."""


Oracle = tuple[nn.Module, torch.Tensor]


def oracle(model_type: str, content: dict[str, Any], tokens: np.ndarray) -> Oracle | None:
    """transformers' model and logits, None where it makes none of the file."""
    if content["num_hidden_layers"] > 2:
        return None
    try:
        model = transformers_model(content, model_type)
        randomize(model)
        with torch.no_grad():
            return model, model(torch.from_numpy(tokens), use_cache=False).logits
    except Exception:  # of any kind: strict types, validators, shapes that do not fit
        return None


def with_head_dim(content: dict[str, Any]) -> dict[str, Any]:
    """What a head_dim of null means; some of transformers' classes fail over it, other readers do not."""
    share = content["hidden_size"] // content["num_attention_heads"]
    return content if content.get("head_dim") else {**content, "head_dim": share}


def outcome(model_type: str, content: dict[str, Any], length: int) -> str:
    """What became of one file; asserts that it is what should."""
    tokens = random_tokens(content["vocab_size"], batch=1, length=length)
    plain = oracle(model_type, content, tokens)
    expected = plain or oracle(model_type, with_head_dim(content), tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if expected is not None:
            save(expected[0], content, folder)
        (folder / "config.json").write_text(json.dumps(content))
        try:
            architecture = describe_model(folder)
            check_layout(architecture, ParallelSizes())
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert "config.json" in message or str(folder) in message
            assert plain is None or DELIBERATE.search(message), message
            return "refused" if plain is None else "refused on purpose"
        assert expected is not None, "transformers makes no model of it"
        check_checkpoint(architecture, folder)
        logits = whole_logits(run_ranks(1, local_logits, folder, ParallelSizes(), tokens))
        if not bool(expected[1].isfinite().all()):
            return "not finite"
        assert relative_error(logits, expected[1]) < 1e-4
        return "equal"


def test_the_model_type_decides(tmp_path: Path) -> None:
    """As in transformers; engines go by ``architectures``, so the two may not contradict each other."""

    def family_of(**content: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **content}))
        return describe_model(tmp_path).family

    assert family_of(model_type="granite", architectures=[]) == "GraniteForCausalLM"
    assert family_of(model_type="granite") == "GraniteForCausalLM"
    assert family_of(architectures=["GraniteForCausalLM"]) == "GraniteForCausalLM"
    for other in ("GraniteModel", "GraniteForSequenceClassification", "LlamaForCausalLM"):
        with pytest.raises(UserError, match=f"architecture {other} is not supported"):
            family_of(model_type="granite", architectures=[other])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("smollm3", {"no_rope_layer_interval": 1, "rope_scaling": {"type": "su", "factor": 2.0}}),
        ("ministral", {"head_dim": 16, "sliding_window": None}),
        ("gemma3_text", {"head_dim": 16, "sliding_window": None, "sliding_window_pattern": 1}),
    ],
)
def test_what_no_layer_uses_is_refused_where_transformers_needs_it(model_type: str, changes: dict[str, Any]) -> None:
    content = {**SIZES, "num_hidden_layers": 1, "model_type": model_type, **changes}
    assert outcome(model_type, content, POSITIONS) == "refused"


def check_configs(examples: int, **options: Any) -> dict[str, int]:
    """How often each outcome was seen."""
    seen: dict[str, int] = {}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **options)
    @given(configs())
    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        model_type, content = drawn
        # longer than the positions only where that has a meaning
        for length in (POSITIONS // 2, 2 * POSITIONS if "dynamic" in json.dumps(content) else POSITIONS):
            found = outcome(model_type, content, length)
            event(found)
            seen[found] = seen.get(found, 0) + 1
            if found != "equal":
                break

    check()
    return seen


def test_configs_are_read_as_transformers_reads_them() -> None:
    seen = check_configs(70, derandomize=True)
    assert seen["equal"] > 60
    assert seen["refused"] > 5
    assert seen.get("not finite", 0) < 5


@pytest.mark.slow
def test_many_configs_are_read_as_transformers_reads_them() -> None:
    check_configs(500, database=None)
