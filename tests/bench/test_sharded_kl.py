"""`bench kl` over several ranks: contestants agree on the gradients of their shards, and rows say what was timed."""

import json

import pytest

from megaqad.bench import sharded_kl
from tests.losses.oracle import relative_error


def bench(rank, world_size):
    """Rows, and the gradients of every contestant on this rank's shard."""
    from megaqad.bench import kl_contestants as ends
    from megaqad.runtime.ranks import ParallelSizes, parallel

    ends.import_modelopt()  # it cannot be imported once the CPU device layer is on
    with parallel(ParallelSizes(tensor=world_size)) as context:
        rows = list(sharded_kl.bench_sharded_kl(context, [(30, 401)], [(40, 500, 64)], repeats=2))
        student, teacher = (
            z.tensor_split(world_size, 1)[rank] for z in ends.make_logits(30, 401, context.device, seed=0)
        )
        contestants = sharded_kl._of_logits(student, teacher, context)
        return rows, {name: prepare()()[0] for name, prepare in contestants.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_contestants_agree_and_rows_are_whole(run_ranks, ranks: int) -> None:
    for rows, gradients in run_ranks(ranks, bench):
        assert json.loads(json.dumps(rows)) == rows
        assert [(row["operation"], row["impl"]) for row in rows] == [
            *(("logits", name) for name in ("megaqad", "megaqad_torch", "modelopt")),
            *(("heads", name) for name in ("megaqad", "modelopt", "products")),
        ]
        for row in rows:
            assert row["ranks"] == ranks
            assert row["seconds"] > 0
            assert (row["impl"] == "modelopt") <= (row["ratio_to_modelopt"] == 1.0)
        for name, gradient in gradients.items():
            assert relative_error(gradient, gradients["megaqad"].double()) <= 3e-3, name
