"""`bench kl`: the contestants compute the same thing, on one rank and on shards, and the rows say what was measured."""

import json

import pytest
import torch

from benchmarks import contestants as ends
from benchmarks import kl as bench
from benchmarks.contestants import Place
from tests.losses.oracle import relative_error

HERE = Place(torch.device("cpu"))


def test_contestants_on_logits_agree() -> None:
    contestants = ends.logits_contestants(20, 500, HERE, seed=0)
    gradients = {name: prepare()()[0] for name, prepare in contestants.items()}
    assert set(gradients) == {"megaqad", "megaqad_torch", "megaqad_reference", "plain", "modelopt"}
    for name, gradient in gradients.items():
        assert relative_error(gradient, gradients["megaqad_reference"]) <= 3e-3, name


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_contestants_on_heads_agree_as_far_as_their_logits_do(share: float) -> None:
    problem = ends.ignore(ends.make_problem(40, 500, 64, HERE, seed=0), share)
    assert int((problem.weights == 0).sum()) == 40 * share
    torch.testing.assert_close(problem.weights.sum(), torch.tensor(1.0))
    contestants = ends.head_contestants(problem, HERE)
    ours = contestants["megaqad"]()()
    for name in set(contestants) - {"products", "products_fp32"}:
        bound = 3e-3 if name.startswith("megaqad") else 1.0  # BF16 logits: that is the finding
        for gradient, expected in zip(contestants[name]()(), ours, strict=True):
            assert relative_error(gradient, expected) <= bound, name


def test_rows(monkeypatch) -> None:
    monkeypatch.setattr(bench, "_ERRORS", (32, 2000, 64))
    rows = list(bench.bench_kl([(30, 400)], [(40, 500, 16)], place=HERE, repeats=2))
    assert json.loads(json.dumps(rows)) == rows
    assert {(row["bench"], row["ranks"]) for row in rows} == {("kl", 1)}
    errors = {row["impl"]: row for row in rows if row["operation"] == "errors"}
    assert errors["megaqad"]["hidden_gradient_error"] <= 5e-3
    assert errors["modelopt"]["hidden_gradient_error"] >= 0.1
    timed = [row for row in rows if row["operation"] != "errors" and "skipped" not in row]
    liger = [row for row in rows if row["impl"] == "liger"]
    assert len(liger) == 2, "measured, or a row that says why not"
    assert {(row["operation"], row["ignored"]) for row in timed} == {("logits", 0.0), ("heads", 0.0), ("heads", 0.5)}
    for row in timed:
        assert 0 < row["seconds_min"] <= row["seconds"]
        assert row["peak_tensor_bytes"] > 0
        assert (row["impl"] == "modelopt") <= (row["ratio_to_modelopt"] == 1.0)
        assert (row["operation"] == "heads") == ("ratio_to_products" in row)
    memory = {(row["operation"], row["impl"]): row["peak_tensor_bytes"] for row in timed}
    assert memory["logits", "megaqad"] < memory["logits", "modelopt"] / 5


def test_a_round_is_the_least() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        list(bench.bench_kl([(4, 40)], place=HERE, repeats=0))


def sharded(rank, world_size):
    """Rows, and the gradients of every contestant on this rank's shard."""
    from megaqad.runtime.ranks import ParallelSizes, parallel

    ends.import_modelopt()  # it cannot be imported once the CPU device layer is on
    with parallel(ParallelSizes(tensor=world_size)) as ranks:
        place = Place(ranks.device, ranks.tensor_group)
        rows = list(bench.bench_kl([(30, 401)], [(40, 500, 64)], place=place, repeats=2))
        problem = ends.make_problem(40, 500, 64, place, seed=0)
        summed = ends.head_contestants(problem, place)["modelopt"]()()[0]
        whole = ends.head_contestants(ends.make_problem(40, 500, 64, HERE, seed=0), HERE)["modelopt"]()()[0]
        logits = ends.logits_contestants(30, 401, place, seed=0)
        return rows, {name: prepare()()[0] for name, prepare in logits.items()}, summed, whole


def test_contestants_agree_on_shards(run_ranks) -> None:
    for rows, gradients, summed, whole in run_ranks(2, sharded):
        assert json.loads(json.dumps(rows)) == rows
        assert [(row["operation"], row["impl"]) for row in rows] == [
            *(("logits", name) for name in ("megaqad", "megaqad_torch", "megaqad_reference", "modelopt")),
            *(("heads", name) for name in ("megaqad", "megaqad_torch", "modelopt", "products", "products_fp32")),
        ]
        assert {row["ranks"] for row in rows} == {2}
        assert all(row["seconds"] > 0 for row in rows)
        for name, gradient in gradients.items():
            assert relative_error(gradient, gradients["megaqad"].double()) <= 3e-3, name
        assert relative_error(summed, whole.double()) <= 0.02, "summed over the ranks, as a column-parallel head does"
