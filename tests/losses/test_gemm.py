"""The products of the heads: FP32 results of BF16 operands, by products.cpp and by widening, against FP64."""

import os
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch
from torch import Tensor

from megaqad.losses import build_objective, gemm, kernels, products
from megaqad.losses.objectives.base import ALL, Chunk
from tests.losses.heads import make_heads
from tests.losses.implementations import NATIVE
from tests.losses.oracle import relative_error
from tests.losses.test_linear import call

needs_products = pytest.mark.skipif(products.unavailable() is not None, reason=str(products.unavailable()))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def part(matrix: Tensor) -> Tensor:
    """The same numbers among others that must not be read or written: NaN."""
    rows, columns = matrix.shape
    whole = torch.full((rows + 3, columns + 5), torch.nan, dtype=matrix.dtype)
    whole[1 : rows + 1, 2 : columns + 2] = matrix
    return whole[1 : rows + 1, 2 : columns + 2]


@needs_products
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 515])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 127, 128, 131, 1027])
@pytest.mark.parametrize("width", [2, 6, 96, 130])
def test_every_tail_keeps_the_accumulator(tokens: int, vocabulary: int, width: int) -> None:
    assert products.serves(width)
    hidden, head, slope = part(draw(tokens, width)), part(draw(vocabulary, width)), part(draw(tokens, vocabulary))
    logits, into_head = part(torch.zeros(tokens, vocabulary)), part(torch.full((vocabulary, width), 0.5))
    products.logits_(logits, hidden, head)
    products.head_gradient(into_head, slope, hidden)
    assert relative_error(logits, hidden.double() @ head.double().t()) <= 1e-6
    assert relative_error(products.hidden_gradient(slope, head), slope.double() @ head.double()) <= 1e-6
    assert relative_error(into_head, slope.double().t() @ hidden.double() + 0.5) <= 1e-6
    fresh = products.head_gradient(None, slope, hidden)
    assert relative_error(fresh, slope.double().t() @ hidden.double()) <= 1e-6
    for written in (logits, into_head):
        assert int(written._base.isfinite().sum()) == written.numel(), "nothing is written beside the part"


@needs_products
def test_matrices_that_lie_transposed() -> None:
    hidden, head, slope = draw(64, 20).t(), draw(64, 300).t(), draw(300, 20).t()
    logits = products.logits_(torch.empty(20, 300), hidden, head)
    assert relative_error(logits, hidden.double() @ head.double().t()) <= 1e-6
    assert relative_error(products.hidden_gradient(slope, head), slope.double() @ head.double()) <= 1e-6


@needs_products
@pytest.mark.parametrize("sizes", [(0, 4, 2), (3, 0, 2)])
def test_nothing_to_multiply(sizes: tuple[int, int, int]) -> None:
    tokens, vocabulary, width = sizes
    hidden, head, slope = draw(tokens, width), draw(vocabulary, width), draw(tokens, vocabulary)
    assert products.logits_(torch.empty(tokens, vocabulary), hidden, head).shape == (tokens, vocabulary)
    assert not products.hidden_gradient(slope, head).any()
    assert products.head_gradient(torch.ones(vocabulary, width), slope, hidden).all()
    assert not products.head_gradient(None, slope, hidden).any()


@needs_products
def test_any_number_of_threads_gives_the_same_bits() -> None:
    hidden, head, slope = draw(65, 320), draw(1000, 320), draw(65, 1000)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits = products.logits_(torch.empty(65, 1000), hidden, head)
        into_head = products.head_gradient(None, slope, hidden)
        results.append([logits, products.hidden_gradient(slope, head), into_head])
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@needs_products
def test_writes_are_seen_by_autograd() -> None:
    kept = torch.zeros(2, 2, requires_grad=True).exp()  # saves its own result
    with torch.no_grad():
        products.logits_(kept, draw(2, 2), draw(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_an_odd_width_is_widened() -> None:
    assert not products.serves(33)
    hidden, head = draw(5, 33), draw(40, 33)
    assert not gemm.direct(hidden, head)
    assert relative_error(gemm.logits_(torch.empty(5, 40), hidden, head), hidden.double() @ head.double().t()) <= 1e-6


def test_widening_gives_the_same_loss() -> None:
    heads = make_heads(dtype=torch.bfloat16)
    direct, loss, _ = call(heads)
    loss.backward()
    with mock.patch.object(products, "serves", return_value=False):
        widened, reference_loss, _ = call(heads)
        reference_loss.backward()
    assert abs(loss - reference_loss) <= 1e-6 * reference_loss
    for mine, theirs in ((direct.student_hidden, widened.student_hidden), (direct.student_head, widened.student_head)):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative_error(mine.grad, theirs.grad.double()) <= 4e-3


OBJECTIVES = {
    "forward_kl": {"forward_kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "jsd": {"jsd": 1.0},
    "logit_mse": {"logit_mse": 1.0},
    "cross_entropy": {"cross_entropy": 1.0},
    "mixture": {"forward_kl": 0.7, "cross_entropy": 0.3, "logit_mse": 0.1},
}


@pytest.mark.parametrize("impl", ["torch", NATIVE])
@pytest.mark.parametrize("weights", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("columns", [5, 16, 1003])
def test_a_bf16_gradient_may_lie_on_either_models_logits(impl: str, weights: dict[str, float], columns: int) -> None:
    """Row by row over logits that are still to be read: the bits of the FP32 gradient, rounded once."""
    draw = torch.Generator().manual_seed(columns)
    teacher = 3 * torch.randn(300, columns, generator=draw)
    student = teacher + 0.3 * torch.randn(300, columns, generator=draw)
    labels, scale = torch.randint(columns, (300,), generator=draw), torch.rand(300, generator=draw).double()
    scale[:5] = 0

    def gradient(place: str) -> Tensor:
        chunk = Chunk(student.clone(), teacher.clone(), labels)
        evaluation = build_objective(weights).open(chunk, kernels.choose(impl, student.device, {torch.float32}))
        for _ in range(evaluation.rounds):
            evaluation.merge(evaluation.local().unsqueeze(0))
        logits = {"own": torch.empty(300, columns), "student": chunk.student, "teacher": chunk.teacher}[place]
        out = logits if place == "own" else logits.view(torch.bfloat16)[:, :columns]
        evaluation.gradient(ALL, scale, out=out)
        return out

    expected = gradient("own").bfloat16()
    for place in ("student", "teacher"):
        torch.testing.assert_close(gradient(place), expected, rtol=0, atol=0)


def test_a_likely_label_keeps_its_digits_in_bf16() -> None:
    student = torch.tensor([[0.0, 9.0, 0.0]])
    chunk = Chunk(student.clone(), None, torch.tensor([1]))
    evaluation = build_objective({"cross_entropy": 1.0}).open(chunk, kernels.TORCH)
    evaluation.merge(evaluation.local().unsqueeze(0))
    out = torch.empty(1, 3, dtype=torch.bfloat16)
    evaluation.gradient(ALL, torch.ones(1, dtype=torch.float64), out=out)
    expected = student.double().softmax(-1) - torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)


WITHOUT_AMX = """
    import torch
    from megaqad.losses import linear_kl, products
    print(products.unavailable())
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 16, generator=draw).bfloat16(), torch.randn(300, 16, generator=draw).bfloat16()
    loss, _ = linear_kl(hidden, head, hidden.roll(1, 0), head, token_weights=torch.full((40,), 1 / 40))
    a, b = (x.double() @ head.double().t() for x in (hidden, hidden.roll(1, 0)))
    print(abs(float(loss / torch.nn.functional.kl_div(
        a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True)) - 1) < 1e-6)
"""


def test_a_processor_without_matrix_instructions() -> None:
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_AMX)]
    # Only where there are some to leave out: a processor with AVX2 alone would be told to run what it does not know.
    capped = {} if products.unavailable() else {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | capped, check=True, timeout=300)
    reason, right = done.stdout.splitlines()
    assert reason in (products.NO_AMX, products.unavailable())
    assert right == "True"
