"""A sharded vocabulary gives what the dense one gives: uneven, empty and all-padding shards, masks, one collective."""

import functools

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from megaqad.losses import vocab_parallel_kl
from tests.losses.implementations import FAST_IMPLEMENTATIONS, IMPLEMENTATIONS
from tests.losses.oracle import assert_token_kl, dense_kl_and_gradient, logit_pair, relative_error
from tests.losses.tracing import collectives
from tests.ranks import run_ranks

TOKENS, VOCABULARY = 13, 5008
CUTS = {
    1: [0, 5008],
    3: [0, 5, 5, 5008],  # an empty shard in the middle
    4: [0, 1024, 2600, 4500, 5008],  # with padding from column 4500, the last shard is all padding
}
CASES = ["close", "unrelated", "offset", "spikes", "padded", "bf16", "temperature", "nothing"]


def mask_of(case: str) -> Tensor:
    return torch.zeros(TOKENS, dtype=torch.bool) if case == "nothing" else torch.arange(TOKENS) % 4 != 1


def make(case: str) -> tuple[Tensor, Tensor, float]:
    noise = {"unrelated": 4.0, "spikes": 1.0}.get(case, 0.05)
    student, teacher = logit_pair(TOKENS, VOCABULARY, noise, torch.bfloat16 if case == "bf16" else torch.float32)
    if case == "offset":
        student, teacher = student + 1e4, teacher - 1e4
    if case == "spikes":
        student[:, 4000], teacher[:, 4000] = 1e4, 1e4 + 1
        student[::2, 9], teacher[::2, 9] = 1e4 - 0.5, 1e4 + 0.25
    if case == "padded":
        student[:, 4500:], teacher[:, 4500:] = -torch.inf, -torch.inf
    if case in ("padded", "nothing"):
        ignored = ~mask_of(case)
        student[ignored, 1000:], teacher[ignored, :2000] = torch.nan, torch.nan
    return student, teacher, 2.5 if case == "temperature" else 1.0


def shard_results(rank: int, world_size: int, impl: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Per case: this rank's token KL and the gradient of its columns."""
    group = dist.group.WORLD if world_size > 1 else None
    columns = slice(CUTS[world_size][rank], CUTS[world_size][rank + 1])
    results = {}
    for case in CASES:
        student, teacher, temperature = make(case)
        leaf = student[:, columns].clone().requires_grad_()
        mask = mask_of(case)
        token_kl = vocab_parallel_kl(
            leaf, teacher[:, columns], temperature=temperature, group=group, token_mask=mask, impl=impl
        )
        token_kl.sum().backward()
        results[case] = (token_kl.detach(), leaf.grad)
    return results


@functools.cache
def on_ranks(world_size: int, impl: str) -> list[dict[str, tuple[Tensor, Tensor]]]:
    return run_ranks(world_size, shard_results, impl)


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sharded_equals_dense(impl: str, world_size: int) -> None:
    dense = shard_results(0, 1, impl)
    shards = on_ranks(world_size, impl)
    for case in CASES:
        for token_kl, _ in (rank[case] for rank in shards):
            assert torch.equal(token_kl, shards[0][case][0]), "every rank has the full KL"
            assert_token_kl(token_kl, dense[case][0].double())
        gradient = torch.cat([rank[case][1] for rank in shards], dim=1)
        expected = dense[case][1]
        if case == "bf16":
            assert (gradient == expected).double().mean() >= 0.99
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max() * (200 if case == "bf16" else 1)
        assert (gradient[~mask_of(case)] == 0).all()
        assert case != "nothing" or (gradient == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sharded_is_right_not_only_the_same(impl: str) -> None:
    """In particular the gradient has no factor of the group's size."""
    shards = on_ranks(4, impl)
    for case in CASES:
        if case == "nothing":
            continue  # an error relative to 0
        student, teacher, temperature = make(case)
        true_kl, true_gradient = dense_kl_and_gradient(student, teacher, mask_of(case).float(), temperature)
        assert_token_kl(shards[3][case][0], true_kl)
        gradient = torch.cat([rank[case][1] for rank in shards], dim=1)
        bound = {"bf16": 4e-3, "spikes": 1e-4, "offset": 1e-4}.get(case, 3e-5)
        assert relative_error(gradient, true_gradient) <= bound, case


def traced_call(rank: int, world_size: int, impl: str) -> list[tuple[list[tuple[str, int]], list[str]]]:
    """For forward and backward: what `megaqad.losses` asked of torch.distributed, and what the profiler saw of it."""
    student, teacher = logit_pair(TOKENS, 600, 0.3)
    half = slice(rank * 300, rank * 300 + 300)
    leaf = student[:, half].clone().requires_grad_()
    seen = []
    loss = torch.zeros(())
    for direction in ("forward", "backward"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, collectives() as asked:
            if direction == "forward":
                loss = vocab_parallel_kl(leaf, teacher[:, half], group=dist.group.WORLD, impl=impl).sum()
            else:
                loss.backward()
        issued = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
        seen.append((asked, issued))
    return seen


@pytest.mark.parametrize("impl", FAST_IMPLEMENTATIONS)
def test_one_all_gather_of_20_bytes_per_token_and_none_in_backward(impl: str) -> None:
    for (asked, issued), backward in run_ranks(2, traced_call, impl):
        assert asked == [("all_gather", 20 * TOKENS)]
        assert len(issued) == 1, issued
        assert "gather" in issued[0]
        assert backward == ([], [])
