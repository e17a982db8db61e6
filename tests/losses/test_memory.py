"""Memory: constant for `vocab_parallel_kl`, two chunks of logits for `linear_kl`, whatever the number of tokens."""

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.measure import peak_memory
from megaqad.losses import compare_heads, inputs, linear_kl, vocab_parallel_kl
from tests.losses.implementations import NATIVE
from tests.losses.oracle import logit_pair

MB = 1 << 20
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Profiler")


def kl_peak(tokens: int, vocabulary: int, impl: str, *, inplace: bool, dtype: torch.dtype = torch.bfloat16) -> int:
    student, teacher = logit_pair(tokens, vocabulary, 0.1, dtype)
    student.requires_grad_()

    def run() -> None:
        vocab_parallel_kl(student, teacher, inplace=inplace, impl=impl).sum().backward()

    return peak_memory(run, CPU).tensor_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", [NATIVE])
def test_the_native_kernel_needs_64_bytes_per_token(impl: str, dtype: torch.dtype) -> None:
    merging = 128 * 4096
    for tokens, vocabulary in ((64, 100000), (512, 4000), (40000, 64)):
        assert kl_peak(tokens, vocabulary, impl, inplace=True, dtype=dtype) <= 64 * tokens + merging


def sharded_peaks(rank: int, world_size: int, impl: str, sizes: list[tuple[int, int]]) -> list[int]:
    """The larger of tensor bytes and resident bytes of one call, for each (tokens, vocabulary)."""
    peaks = []
    for tokens, vocabulary in sizes:
        student, teacher = logit_pair(tokens, vocabulary // world_size, 0.1, torch.bfloat16, seed=rank)
        student.requires_grad_()
        group = dist.group.WORLD if world_size > 1 else None

        def run(student=student, teacher=teacher, group=group) -> None:
            vocab_parallel_kl(student, teacher, group=group, inplace=True, impl=impl).sum().backward()

        run()  # what the first call leaves behind is no part of a call: code pages, buffers of gloo
        student.grad = None
        peak = peak_memory(run, CPU)
        peaks.append(max(peak.tensor_bytes, peak.resident_bytes or 0))
    return peaks


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_12_mb_and_64_bytes_per_token_whatever_the_vocabulary(run_ranks, impl: str, world_size: int) -> None:
    sizes = [(8, 248320), (512, 8000), (4096, 1000), (40000, 64)]
    for peaks in run_ranks(world_size, sharded_peaks, impl, sizes):
        print(impl, world_size, [f"{peak / MB:.1f} MB" for peak in peaks])
        for (tokens, _), peak in zip(sizes, peaks, strict=True):
            assert peak <= 12 * MB + 64 * tokens


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_others_need_at_most_32_mb(impl: str) -> None:
    assert kl_peak(200, 16000, impl, inplace=True) <= 32 * MB
    assert kl_peak(6, 248320, impl, inplace=True) <= 32 * MB


@pytest.mark.parametrize("impl", ["torch", NATIVE])
def test_beside_the_logits_only_the_gradient_grows(impl: str) -> None:
    constant = 0.0 if impl == "native" else 8 * MB
    assert kl_peak(512, 32000, impl, inplace=False) <= 2.05 * 512 * 32000 + constant


def problem(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, hidden, generator=draw).to(dtype) for rows in (tokens, vocabulary, tokens, vocabulary)]


def linear_peak(
    tokens: int, vocabulary: int, impl: str, *, train: bool = True, dtype: torch.dtype = torch.float32
) -> int:
    hidden_s, head_s, hidden_t, head_t = problem(tokens, vocabulary, 16, dtype)
    hidden_s.requires_grad_(train)
    head_s.requires_grad_(train)
    weights = torch.full((tokens,), 1 / tokens)

    def run() -> None:
        loss, _ = linear_kl(hidden_s, head_s, hidden_t, head_t, token_weights=weights, impl=impl)
        if train:
            loss.backward()

    return peak_memory(run, CPU).tensor_bytes


@pytest.mark.parametrize(
    ("impl", "vocabulary", "dtype"),
    [
        ("torch", 4000, torch.float32),
        pytest.param(*NATIVE.values, 32000, torch.float32, marks=NATIVE.marks),
        pytest.param(*NATIVE.values, 32000, torch.bfloat16, marks=NATIVE.marks),
    ],
)
def test_linear_kl_needs_two_chunks_and_is_flat_in_tokens(
    impl: str, vocabulary: int, dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(inputs, "_CPU_BUDGET", 2 * 512 * 32000 * 4)  # so that 32000 columns are the smallest chunk
    monkeypatch.setattr(inputs, "_LARGEST_CHUNK", 512)
    hidden = 16
    two_chunks, gradients = 2 * 512 * vocabulary * 4, 2 * (vocabulary + 4096) * hidden * 4
    peaks = {tokens: linear_peak(tokens, vocabulary, impl, dtype=dtype) for tokens in (1024, 2048)}
    per_token = (peaks[2048] - peaks[1024]) / 1024
    assert per_token <= 8 * hidden * 4 + 64, "hidden states and their gradient, nothing of the vocabulary's size"
    assert max(peaks.values()) <= two_chunks + gradients + 16 * MB
    # ModelOpt holds 28 bytes per logit (and the BF16 logits); a bound from above for our own at 8192 tokens
    # (the smaller vocabulary has relatively more of what is constant)
    at_8192 = peaks[2048] + per_token * (8192 - 2048)
    assert at_8192 <= 28 * 8192 * vocabulary / (25 if vocabulary == 32000 else 12)


def test_without_gradients_there_are_only_the_chunks() -> None:
    assert linear_peak(1024, 32000, "auto", train=False) <= 2 * 1024 * 32000 * 4 + 4 * MB


def test_an_evaluation_is_flat_too() -> None:
    peaks = []
    for tokens in (1024, 2048):
        hidden_s, head_s, hidden_t, head_t = problem(tokens, 32000, 16)
        labels, weights = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
        arguments = (hidden_s, head_s, hidden_t, head_t, labels)
        peaks.append(peak_memory(lambda: compare_heads(*arguments, token_weights=weights), CPU).tensor_bytes)  # noqa: B023
    assert (peaks[1] - peaks[0]) / 1024 <= 256
    assert peaks[1] <= 2 * 1024 * 32000 * 4 + 16 * MB
