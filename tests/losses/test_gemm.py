"""The products of the heads: FP32 results of BF16 operands, by MKL and by widening, against FP64."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from megaqad.losses import gemm, mkl
from tests.losses.heads import make_heads
from tests.losses.oracle import relative_error
from tests.losses.test_linear import call

needs_mkl = pytest.mark.skipif(not mkl.available(), reason="this build of PyTorch exports no MKL")

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 1000, 96), (17, 4099, 33), (512, 1, 16), (1, 130, 16)]
"""tokens, vocabulary, hidden"""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@needs_mkl
@pytest.mark.parametrize("shape", SHAPES)
def test_mkl_keeps_the_accumulator(shape: tuple[int, int, int]) -> None:
    tokens, vocabulary, hidden = shape
    h, head, slope = draw(tokens, hidden), draw(vocabulary, hidden), draw(tokens, vocabulary)
    logits = mkl.mm_(torch.full((tokens, vocabulary), torch.nan), h, head.t())
    assert relative_error(logits, h.double() @ head.double().t()) <= 1e-6
    into_hidden = mkl.mm_(torch.full((tokens, hidden), torch.nan), slope, head)
    assert relative_error(into_hidden, slope.double() @ head.double()) <= 1e-6
    into_head = mkl.mm_(torch.full((vocabulary, hidden), 0.5), slope.t(), h, accumulate=True)
    assert relative_error(into_head, slope.double().t() @ h.double() + 0.5) <= 1e-6


@needs_mkl
def test_mkl_reads_and_writes_parts_of_matrices() -> None:
    a, b = draw(40, 60)[3:20, 5:50], draw(90, 70)[::2, 1:33]
    whole = torch.zeros(30, 64)
    mkl.mm_(whole[2:19, 7:39], a, b)
    assert relative_error(whole[2:19, 7:39], a.double() @ b.double()) <= 1e-6
    whole[2:19, 7:39] = 0
    assert not whole.any(), "nothing is written beside the part"
    strided = draw(45, 64)[:, ::2]
    assert relative_error(mkl.mm_(torch.empty(17, 32), a, strided), a.double() @ strided.double()) <= 1e-6


@needs_mkl
def test_mkl_without_columns_or_terms() -> None:
    assert not mkl.mm_(torch.ones(2, 3), draw(2, 0), draw(0, 3)).any()
    assert mkl.mm_(torch.ones(2, 3), draw(2, 0), draw(0, 3), accumulate=True).all()
    assert mkl.mm_(torch.empty(2, 0), draw(2, 4), draw(4, 0)).shape == (2, 0)


@needs_mkl
def test_mkl_writes_are_seen_by_autograd() -> None:
    out = torch.zeros(2, 2, requires_grad=True)
    kept = (out * 1.0).exp()  # saves its own result
    with torch.no_grad():
        mkl.mm_(kept, draw(2, 2), draw(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_widening_gives_the_same_loss() -> None:
    heads = make_heads(dtype=torch.bfloat16)
    direct, loss, _ = call(heads)
    loss.backward()
    with mock.patch.object(mkl, "available", return_value=False):
        widened, reference_loss, _ = call(heads)
        reference_loss.backward()
    assert abs(loss - reference_loss) <= 1e-6 * reference_loss
    for mine, theirs in ((direct.student_hidden, widened.student_hidden), (direct.student_head, widened.student_head)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative_error(mine.grad, theirs.grad.double()) <= 4e-3


def test_the_narrow_slope_takes_the_teachers_memory() -> None:
    gradient, spare = torch.randn(3, 5), torch.zeros(3, 5)
    narrow = gemm.slope(gradient, spare, narrow=True)
    assert torch.equal(narrow, gradient.bfloat16())
    assert narrow.untyped_storage().data_ptr() == spare.untyped_storage().data_ptr()
    assert torch.equal(gemm.slope(gradient, None, narrow=True), gradient.bfloat16())
    assert gemm.slope(gradient, spare, narrow=False) is gradient
