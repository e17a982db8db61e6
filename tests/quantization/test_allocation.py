"""The groups that get more bits are those that cost the most KL for what the bits are."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization import allocation
from megaqad.quantization.allocation import GroupKL, average_bits, choose, groups_of, predicted_kl


def groups(*kls, weights=None, fp8=None):
    """Groups by their KLs; ``fp8``: theirs in FP8, when it is a candidate."""
    weights = weights or [1024] * len(kls)
    others = [{} if fp8 is None else {"fp8": kl} for kl in fp8 or kls]
    return [GroupKL(f"g{i}", *rest) for i, rest in enumerate(zip(kls, weights, others, strict=True))]


def best_by_trying(measured, target):
    """The least KL that any choice within the target leaves."""
    left = []
    for names in product(*([None, "bf16", *group.others] for group in measured)):
        chosen = {group.group: name for group, name in zip(measured, names, strict=True) if name is not None}
        if average_bits(measured, chosen) <= target + 1e-9:
            left.append(predicted_kl(measured, chosen))
    return min(left)


def test_the_sensitive_group_is_kept():
    assert choose(groups(0.001, 0.05, 0.002, 0.003), 7.5) == {"g1": "bf16"}


def test_a_large_group_gives_way_to_two_small_ones():
    measured = groups(0.010, 0.007, 0.007, weights=[2048, 1024, 1024])
    assert choose(measured, 4.5 + 11.5 / 2) == {"g1": "bf16", "g2": "bf16"}


def test_fp8_for_many_beats_bf16_for_one():
    measured = groups(0.010, 0.009, 0.008, 0.001, fp8=[0.0001, 0.0001, 0.0001, 0.0001])
    assert choose(measured, 4.5 + 3.5 * 3 / 4) == {"g0": "fp8", "g1": "fp8", "g2": "fp8"}
    assert average_bits(measured, {"g0": "fp8", "g2": "bf16"}) == (8 + 4.5 + 16 + 4.5) / 4


def test_a_group_that_fp8_hurts_is_kept_bf16():
    measured = groups(0.010, 0.001, 0.001, fp8=[0.009, 0.0001, 0.0001])
    assert choose(measured, 4.5 + 11.5 / 3) == {"g0": "bf16"}
    assert choose(groups(0.01, 0.01, fp8=[0.0, 0.0]), 15.9) == {"g0": "fp8", "g1": "fp8"}, "no more bits than help"
    assert choose(groups(0.0, 0.0, fp8=[0.01, 0.01]), 15.9) == {}


KLS = st.integers(1, 99)  # of two digits, as they are compared


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(KLS, KLS, st.sampled_from([1, 2, 3, 5])), min_size=2, max_size=6),
    st.floats(4.5, 15.9),
    st.booleans(),
)
def test_no_choice_is_better(drawn, target, with_fp8):
    nvfp4, fp8, sizes = zip(*drawn, strict=True)
    measured = groups(
        *(kl / 1000 for kl in nvfp4),
        fp8=[kl / 10_000 for kl in fp8] if with_fp8 else None,
        weights=[size * 4096 for size in sizes],
    )
    chosen = choose(measured, target)
    assert average_bits(measured, chosen) <= target + 1e-9
    assert predicted_kl(measured, chosen) == pytest.approx(best_by_trying(measured, target), abs=1e-12)


@pytest.mark.parametrize("target", [5.0, 6.3, 8.0, 11.0])
def test_sizes_without_a_common_divisor_stay_within_the_target(target):
    """Sizes are rounded up to steps then: no choice is better at a target that is a step per group lower."""
    sizes = [3_000_017 + 1_009 * index**2 for index in range(7)]
    kls = [0.001 + 0.001 * (index * 5 % 7) for index in range(7)]
    measured = groups(*kls, fp8=[round(kl / (3 + index), 4) for index, kl in enumerate(kls)], weights=sizes)
    chosen = choose(measured, target)
    assert average_bits(measured, chosen) <= target
    lower = target - (len(sizes) + 1) * 11.5 / allocation._MOST_UNITS
    assert predicted_kl(measured, chosen) <= best_by_trying(measured, lower) + 1e-12


def test_the_last_digits_do_not_decide():
    """Two layouts measure the same KL only up to rounding; equal groups are kept in model order."""
    assert choose(groups(0.01234567, 0.01234566, 0.001), 8.4) == {"g0": "bf16"}
    assert choose(groups(0.01234566, 0.01234567, 0.001), 8.4) == {"g0": "bf16"}


def test_at_the_least_target_nothing_is_kept():
    assert choose(groups(0.1, 0.2, fp8=[0.01, 0.01]), 4.5) == {}


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
