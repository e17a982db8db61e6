"""Batches are a pure function of the seed and the sample's number, whatever the layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqad.data.dataset import Batch, TokenDataset, epoch_order, mixed
from megaqad.errors import UserError


def make(count: int, sequence_length: int = 8, seed: int = 1) -> TokenDataset:
    return TokenDataset(torch.arange(count, dtype=torch.int32), sequence_length=sequence_length, seed=seed)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*((b.tokens, b.labels, b.weights) for b in batches), strict=True)))


def test_a_sequence_and_its_labels():
    batch = make(100).global_batch(0, global_batch_size=3)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    assert torch.equal(batch.labels, batch.tokens + 1), "tokens count up, so each label is its token plus one"
    assert torch.equal(batch.tokens[:, 0] % 8, torch.zeros(3, dtype=torch.int64)), "sequences start at multiples of s"
    assert torch.equal(batch.weights, torch.ones(3, 8))


@given(
    count=st.integers(18, 400),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 40),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_ranks_together_see_the_global_batch(count: int, micro: int, accumulation: int, step: int, seed: int):
    dataset = make(count, seed=seed)
    size = micro * accumulation * 4
    whole = dataset.global_batch(step, global_batch_size=size).tokens
    for data_size in (1, 2, 4):
        per_rank = [
            dataset.micro_batches(
                step * size, global_batch_size=size, micro_batch_size=micro, data_rank=rank, data_size=data_size
            )
            for rank in range(data_size)
        ]
        assert {len(batches) for batches in per_rank} == {size // (micro * data_size)}
        in_order = [batches[m] for m in range(len(per_rank[0])) for batches in per_rank]
        assert torch.equal(joined(in_order).tokens, whole), f"data_size={data_size}"


def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order():
    dataset = make(8 * 50 + 1)
    assert len(dataset) == 50
    first, second = (dataset.global_batch(epoch, global_batch_size=50).tokens for epoch in (0, 1))
    assert torch.equal(first.flatten().sort().values, torch.arange(400))
    assert torch.equal(second.flatten().sort().values, torch.arange(400))
    assert not torch.equal(first, second)


def test_a_global_batch_larger_than_the_data_repeats_epochs():
    batch = make(8 * 3 + 1).global_batch(0, global_batch_size=7)
    starts = batch.tokens[:, 0].tolist()
    assert sorted(starts[:3]) == sorted(starts[3:6]) == [0, 8, 16]


def test_the_seed_decides_and_nothing_else():
    one, same, other = make(1000, seed=1), make(1000, seed=1), make(1000, seed=2)
    assert torch.equal(
        one.global_batch(5, global_batch_size=8).tokens, same.global_batch(5, global_batch_size=8).tokens
    )
    assert not torch.equal(
        one.global_batch(5, global_batch_size=8).tokens, other.global_batch(5, global_batch_size=8).tokens
    )


def test_the_hash_is_splitmix64():
    """The published outputs for seed 1234567; the generator's state moves by the golden-ratio constant."""
    states = (1234567 + 0x9E3779B97F4A7C15 * np.arange(5, dtype=object)) % 2**64
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert mixed(states.astype(np.uint64)).tolist() == [*published, 16408922859458223821]


def test_the_order_is_frozen():
    """A golden order: a change here changes every run that has ever been recorded or resumed."""
    assert epoch_order(1, 0, 12).tolist() == [10, 8, 1, 5, 2, 0, 7, 3, 9, 11, 6, 4]


def test_positions_are_spread_evenly():
    """Mean place of each of 20 sequences over 2,000 epochs: 9.5 +- 0.13 (standard error); a biased order fails."""
    places = torch.zeros(20)
    for epoch in range(2000):
        places[torch.from_numpy(epoch_order(3, epoch, 20).copy())] += torch.arange(20)
    assert ((places / 2000 - 9.5).abs() < 0.65).all(), places / 2000


@given(
    count=st.integers(2, 300),
    length=st.integers(1, 20),
    micro=st.integers(1, 4),
    data_size=st.integers(1, 3),
    most=st.integers(0, 350),
)
@settings(deadline=None, max_examples=150)
def test_evaluation_predicts_every_token_once(count: int, length: int, micro: int, data_size: int, most: int):
    dataset = make(count, sequence_length=length)
    per_rank = [dataset.evaluation_batches(micro, rank, data_size, most) for rank in range(data_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    everything = joined([batches[m] for m in range(len(per_rank[0])) for batches in per_rank])
    assert all(batch.tokens.shape == (micro, length) for batches in per_rank for batch in batches)
    counted = everything.weights.bool()
    expected = min(count - 1, most) if most else count - 1
    assert torch.equal(everything.labels[counted], torch.arange(1, expected + 1)), "in order, once each"
    assert torch.equal(everything.tokens[counted], torch.arange(expected)), "each behind the token before it"


def test_fingerprint_names_what_decides_the_batches():
    def fingerprint(tokens=range(50), length=8, seed=1, origin="a") -> str:
        data = torch.tensor(list(tokens), dtype=torch.int32)
        return TokenDataset(data, sequence_length=length, seed=seed, origin=origin).fingerprint()

    variants = [
        fingerprint(),
        fingerprint(tokens=[*range(49), 7]),
        fingerprint(length=9),
        fingerprint(seed=2),
        fingerprint(origin="b"),
    ]
    assert len(set(variants)) == 5
    assert fingerprint() == variants[0]
    wide = TokenDataset(torch.arange(50), sequence_length=8, seed=1, origin="a")
    assert wide.fingerprint() == variants[0], "int64 and int32 hold the same tokens"


def test_refusals():
    with pytest.raises(UserError, match=r"has 8 tokens, fewer than one sequence needs \(8 \+ 1\)"):
        make(8).global_batch(0, global_batch_size=1)
    with pytest.raises(UserError, match="has 1 tokens, too few to predict one"):
        make(1)
    with pytest.raises(UserError, match=r"global_batch_size=6 is no multiple of .* = 2 x 2 = 4"):
        make(100).micro_batches(0, global_batch_size=6, micro_batch_size=2, data_rank=0, data_size=2)
