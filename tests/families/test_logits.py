"""Every dense family computes what transformers computes, in every division, and gives its checkpoint back."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaqad.models.checks import check_checkpoint, check_layout
from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes
from tests.families.checkpoints import (
    ADDED,
    CASES,
    make_checkpoint,
    random_tokens,
    relative_error,
    settings,
    stored_tensors,
    transformers_logits,
)
from tests.families.runs import first_inputs
from tests.models.megatron_runs import local_logits, round_trip, whole_logits
from tests.ranks import run_ranks

DIVISIONS = [
    ParallelSizes(tensor=2),
    ParallelSizes(pipeline=2),
    ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
]
RUNS = [(case, ParallelSizes()) for case in CASES]
RUNS += [(case, sizes) for case in ADDED for sizes in DIVISIONS]
RUNS += [
    ("gemma3_one_group", ParallelSizes(tensor=2, sequence=True)),
    ("olmo2_one_group", ParallelSizes(tensor=4)),
    ("phi3_three_heads", ParallelSizes(tensor=3)),
]


@pytest.mark.parametrize(("case", "sizes"), RUNS, ids=str)
def test_logits_equal_transformers(case: str, sizes: ParallelSizes, tmp_path: Path) -> None:
    folder = make_checkpoint(case, tmp_path, shard_size="60KB")
    architecture = describe_model(folder)
    check_checkpoint(architecture, folder)
    check_layout(architecture, sizes)
    tokens = random_tokens(settings(case)["vocab_size"])
    logits = whole_logits(run_ranks(sizes.model_ranks, local_logits, folder, sizes, tokens))
    assert relative_error(logits, transformers_logits(folder, tokens)) < 1e-5


@pytest.mark.parametrize(
    ("case", "sizes"),
    [*((case, ParallelSizes()) for case in CASES), *((case, ParallelSizes(tensor=2, pipeline=2)) for case in ADDED)],
    ids=str,
)
def test_a_round_trip_is_byte_equal(case: str, sizes: ParallelSizes, tmp_path: Path) -> None:
    """BF16 in and out; config.json too, in the spelling that it had."""
    folder = make_checkpoint(case, tmp_path / "in", dtype=torch.bfloat16, shard_size="60KB")
    run_ranks(sizes.model_ranks, round_trip, folder, sizes, {"output_dir": tmp_path / "out"})
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    original, written = stored_tensors(folder), stored_tensors(tmp_path / "out")
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert written[name].dtype is tensor.dtype is torch.bfloat16, name
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("case", ["gemma3", "granite"])
def test_bf16_embeddings_equal_transformers(case: str, tmp_path: Path) -> None:
    """To the bit: Gemma rounds its multiplier before it multiplies."""
    folder = make_checkpoint(case, tmp_path, dtype=torch.bfloat16, hidden_size=96)  # whose root is no BF16 number
    tokens = random_tokens(settings(case)["vocab_size"])
    found = torch.from_numpy(run_ranks(1, first_inputs, folder, tokens)[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states[0]
    assert torch.equal(found, expected.float())
