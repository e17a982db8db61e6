"""The groups kept in BF16 are those that cost the most KL for what keeping them costs in bits."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization.allocation import GroupKL, average_bits, choose_kept, groups_of


def groups(*kls, weights=None):
    weights = weights or [1024] * len(kls)
    return [GroupKL(f"g{index}", kl, size) for index, (kl, size) in enumerate(zip(kls, weights, strict=True))]


def best_by_trying(measured, target):
    """The least KL that any choice within the target leaves."""
    return min(
        sum(group.kl_to_teacher for group in measured if group.group not in names)
        for size in range(len(measured))
        for names in ([group.group for group in kept] for kept in combinations(measured, size))
        if average_bits(measured, names) <= target + 1e-9
    )


def test_the_sensitive_group_is_kept():
    assert choose_kept(groups(0.001, 0.05, 0.002, 0.003), 7.5) == ["g1"]


def test_a_large_group_gives_way_to_two_small_ones():
    measured = groups(0.010, 0.007, 0.007, weights=[2048, 1024, 1024])
    assert choose_kept(measured, 4.5 + 11.5 / 2) == ["g1", "g2"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 99), st.sampled_from([1, 2, 3, 5])), min_size=2, max_size=7),
    st.floats(4.5, 15.9),
)
def test_no_choice_is_better(drawn, target):
    measured = groups(*(kl / 1000 for kl, _ in drawn), weights=[size * 4096 for _, size in drawn])
    kept = choose_kept(measured, target)
    assert average_bits(measured, kept) <= target + 1e-9
    left = sum(group.kl_to_teacher for group in measured if group.group not in kept)
    assert left == pytest.approx(best_by_trying(measured, target), abs=1e-12)


def test_sizes_without_a_common_divisor_stay_within_the_target():
    sizes = [3_000_017 + 1_009 * index**2 for index in range(30)]
    measured = groups(*(0.001 + 0.0001 * (index * 7 % 11) for index in range(30)), weights=sizes)
    kept = choose_kept(measured, 7.0)
    assert 6.5 < average_bits(measured, kept) <= 7.0


def test_the_last_digits_do_not_decide():
    """Two layouts measure the same KL up to rounding; equal groups are kept in model order."""
    assert choose_kept(groups(0.01234567, 0.01234566, 0.001), 8.4) == ["g0"]
    assert choose_kept(groups(0.01234566, 0.01234567, 0.001), 8.4) == ["g0"]


def test_at_the_least_target_nothing_is_kept():
    assert choose_kept(groups(0.1, 0.2), 4.5) == []


def test_groups_are_the_attention_and_the_mlp_of_a_layer():
    sizes = {
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.self_attn.o_proj": 2,
        "model.layers.1.mlp.experts.0.up_proj": 8,
        "model.layers.10.mlp.up_proj": 8,
        "lm_head": 16,
    }
    found = [(group.name, group.weights) for group in groups_of(list(sizes), sizes)]
    assert found == [
        ("model.layers.1.self_attn", 6),
        ("model.layers.1.mlp", 8),
        ("model.layers.10.mlp", 8),
        ("lm_head", 16),
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("quantization.auto=bits:4", "cannot be met: all NVFP4 is 4.5 bits"),
        ("quantization.auto=bits:16", "cannot be met"),
        ("quantization.auto=bits:six", "is not understood: give bits:<average>"),
        ("quantization.auto=kl:0.1", "is not understood"),
        ("quantization.auto=bits:nan", "is not understood"),
    ],
)
def test_targets_that_cannot_be_are_refused(override, told):
    with pytest.raises(UserError, match=told) as refused:
        load_settings([override])
    assert "\n" not in str(refused.value)


def test_auto_without_quantization_is_refused():
    with pytest.raises(UserError, match=r"weights=none"):
        load_settings(["quantization=none", "quantization.auto=bits:6"])
