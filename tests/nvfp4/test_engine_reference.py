"""The engines' reciprocal form: its own bytes, and exactly where and how far it departs from the division form."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from megaqad.nvfp4 import quantize, tensor_amax
from megaqad.nvfp4.engine_reference import quantize as engine_quantize
from tests.nvfp4 import data
from tests.nvfp4.data import MIDPOINTS

KINDS = ["normal", "weights", "student_t2", "outlier_5e4", "small_integers", "grid_and_midpoints", "zero_blocks"]

E4M3 = [
    Fraction(torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()) for byte in range(0x7F)
]
E4M3_MIDPOINTS = {(a + b) / 2 for a, b in pairwise(E4M3)}
E2M1_MIDPOINTS = {Fraction(m) for m in MIDPOINTS}


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., K] with minus zero folded into zero."""
    c = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    return torch.where(c == 8, 0, c)


def signed_steps(codes: torch.Tensor) -> torch.Tensor:
    """Position on the E2M1 grid, -7 to 7."""
    return torch.where(codes >= 8, 8 - codes.int(), codes.int())


def scalar_engine_codes(x: np.ndarray, input_scale: np.float32) -> tuple[list[int], np.float32]:
    """One block, one float32 operation at a time, straight from the published formula."""
    one, six = np.float32(1), np.float32(6)
    gs = one / input_scale
    scale = gs * (np.abs(x).max() * np.float32(1 / 6))
    sf = np.float32(torch.tensor(min(scale, np.float32(448))).to(torch.float8_e4m3fn).float().item())
    inverse = np.float32(0) if sf == 0 else one / (sf * (one / gs))
    codes = []
    for value in x:
        y = np.float32(min(max(value * inverse, -six), six))
        distances = [abs(abs(float(y)) - v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
        nearest = [i for i, d in enumerate(distances) if d == min(distances)]
        code = next(i for i in nearest if i % 2 == 0) if len(nearest) > 1 else nearest[0]
        codes.append(code + 8 if y < 0 and code else code)
    return codes, sf


@pytest.mark.parametrize("kind", [*KINDS, "every_magnitude", "cauchy"])
def test_against_the_formula_one_scalar_at_a_time(kind):
    x = data.make(kind, torch.bfloat16)[:12]
    q = engine_quantize(x)
    codes = nibbles(q.codes).view(-1, 16)
    for block, got, scale in zip(x.float().view(-1, 16), codes, q.block_scales.float().view(-1), strict=True):
        expected, sf = scalar_engine_codes(block.numpy(), np.float32(q.global_scale.item()))
        assert scale.item() == sf
        assert got.tolist() == expected


def test_small_blocks_are_lost_where_the_division_form_keeps_them():
    scales = torch.tensor([2.0**-9, 1.5 * 2.0**-9, 2.0**-10, 2.0**-10 * (1 + 2.0**-20), 2.0**-11, 0.0])
    x = torch.zeros(6, 16)
    x[:, 0] = 6 * scales
    one = torch.tensor(2688.0)  # the amax whose global scale is exactly 1
    engine, ours = engine_quantize(x, one), quantize(x, one)
    assert engine.block_scales.view(torch.uint8).flatten().tolist() == [1, 2, 0, 1, 0, 0]
    assert ours.block_scales.view(torch.uint8).flatten().tolist() == [1, 2, 1, 1, 1, 0x38]
    assert not engine.codes[[2, 4, 5]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_two_forms_differ_only_at_exact_ties_and_by_one_step(kind, dtype):
    """In rational arithmetic, with the tensor's own amax: a quotient that is no tie gives the same bits in both."""
    for seed in range(4):
        x = data.make(kind, dtype, seed)
        ours, engine = quantize(x), engine_quantize(x)
        amax = Fraction(tensor_amax(x).item())
        blocks = x.float().view(-1, 16)
        a, b = (q.block_scales.view(torch.uint8).flatten().int() for q in (ours, engine))
        nonzero = blocks.abs().amax(-1) > 0
        assert (a[~nonzero] == 0x38).all()
        assert (b[~nonzero] == 0).all()

        for i in torch.nonzero((a != b) & nonzero).flatten().tolist():
            assert abs(a[i] - b[i]) == 1
            assert Fraction(blocks[i].abs().max().item()) * 448 / amax in E4M3_MIDPOINTS

        p, q = (nibbles(t.codes).view(-1, 16) for t in (ours, engine))
        for i, j in torch.nonzero((p != q) & (a == b).unsqueeze(-1)).tolist():
            assert abs(signed_steps(p[i, j]) - signed_steps(q[i, j])) == 1
            quotient = abs(Fraction(blocks[i, j].item())) * 2688 / (E4M3[int(a[i])] * amax)
            assert quotient in E2M1_MIDPOINTS


@pytest.mark.parametrize(
    ("amax", "block_amax", "ours", "engine"),
    [(140.0, 85.0, 0x78, 0x79), (164.0, 123.0, 0x7B, 0x7A), (224.0, 25.0, 0x64, 0x65), (248.0, 93.0, 0x73, 0x72)],
)
def test_the_order_of_operations_shows_at_these_block_scales(amax, block_amax, ours, engine):
    """448 * block_amax / amax is an exact tie, and each form's own roundings decide the side."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 16] = amax, block_amax
    assert quantize(x).block_scales.view(torch.uint8).tolist() == [[0x7E, ours]]
    assert engine_quantize(x).block_scales.view(torch.uint8).tolist() == [[0x7E, engine]]


@pytest.mark.parametrize(
    ("amax", "block_amax", "value", "ours", "engine"),
    [
        (132.0, 55.0, 33.0, 6, 5),  # 3.5 block scales: division says 4, reciprocals 3
        (132.0, 128.0, 77.0, 6, 5),  # and only if the engine divides by 1 / gs, not by input_scale
        (147.0, 121.0, 105.0, 6, 7),  # 5 block scales: division says 4, reciprocals 6
        (152.0, 147.0, 19.0, 2, 1),  # 0.75 block scales: division says 1, reciprocals 0.5
    ],
)
def test_the_order_of_operations_shows_at_these_codes(amax, block_amax, value, ours, engine):
    """Elements that are an exact tie in units of their block scale, which is the same in both forms."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0], x[0, 16], x[0, 17] = amax, block_amax, value
    a, b = quantize(x), engine_quantize(x)
    data.assert_same_bits(a.block_scales, b.block_scales)
    assert (a.codes[0, 8].item() >> 4, b.codes[0, 8].item() >> 4) == (ours, engine)
