"""Import followed by export gives the checkpoint back, byte for byte, from every layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import make_checkpoint
from tests.models.megatron_runs import refused_round_trip, round_trip
from tests.ranks import run_ranks

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("llama", ParallelSizes()),
        ("llama", ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)),
        ("llama_three_groups", ParallelSizes(pipeline=2)),
        ("llama_tied_scaled", ParallelSizes(tensor=4)),
        ("qwen2", ParallelSizes(tensor=2, pipeline=2)),
        ("qwen3", ParallelSizes(tensor=2)),
        ("mistral", ParallelSizes()),
    ],
    ids=str,
)
def test_round_trip_is_byte_equal(case: str, sizes: ParallelSizes, tmp_path: Path) -> None:
    folder = make_checkpoint(case, tmp_path / "in", dtype=BF16)
    (folder / "tokenizer.json").write_text("{}")
    run_ranks(sizes.model_ranks, round_trip, folder, sizes, {"output_dir": tmp_path / "out"})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_sharded_files_in_and_out(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=BF16, shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    sizes = ParallelSizes(tensor=2)
    run_ranks(2, round_trip, folder, sizes, {"output_dir": tmp_path / "out", "max_file_bytes": 50_000})
    written = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    original = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(written) == set(original)
    assert len(set(written.values())) > 3
    for name, file in written.items():
        with safe_open(tmp_path / "out" / file, "pt") as ours, safe_open(folder / original[name], "pt") as theirs:
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_a_rank_reads_its_share_only(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=BF16)
    shapes = describe_model(folder).tensors
    whole = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    sizes = ParallelSizes(tensor=2, pipeline=2)
    statistics = run_ranks(4, round_trip, folder, sizes, {"output_dir": tmp_path / "out"})
    # 515 vocabulary rows: 258 on one rank, 257 on the other; norms are read by both tensor-parallel ranks
    replicated = sum(size for name, size in whole.items() if "norm" in name)
    assert sum(rank.bytes_read for rank in statistics) == sum(whole.values()) + replicated
    for rank in statistics:
        assert rank.largest_bytes <= 258 * 64 * 2
        assert rank.bytes_read < 0.3 * sum(whole.values())


def test_an_occupied_directory_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "in", dtype=BF16)
    occupied = tmp_path / "out"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    messages = run_ranks(2, refused_round_trip, folder, ParallelSizes(tensor=2), {"output_dir": occupied})
    assert all(message.startswith(f"{occupied} already holds notes.txt") for message in messages)
    assert [path.name for path in occupied.iterdir()] == ["notes.txt"]
