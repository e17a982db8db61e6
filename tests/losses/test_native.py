"""The compiled kernel as a guest: threads, odd shapes, and machines that cannot compile it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megaqad.losses import blocks, native
from tests.losses.implementations import WITHOUT_COMPILER
from tests.losses.oracle import logit_pair

needs_compiler = pytest.mark.skipif(WITHOUT_COMPILER is not None, reason=str(WITHOUT_COMPILER))


@needs_compiler
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 4095, 4096, 4097, 8208])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_every_tail_and_mixed_types(columns: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = (x.to(dtype) for x, dtype in zip(logit_pair(3, columns, 0.5), dtypes, strict=True))
    ours, expected = (kernel.statistics(student, teacher, temperature=1.3) for kernel in (native, blocks))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    peaks, factors = expected[[0, 2]].float(), (1 / expected[[1, 3]]).float()
    gradients = [
        kernel.gradient(
            student, teacher, peaks=peaks, factors=factors, temperature=1.3, out=torch.full_like(student, 7.0)
        ).float()
        for kernel in (native, blocks)
    ]
    torch.testing.assert_close(*gradients, rtol=0 if dtypes[0] == torch.float32 else 8e-3, atol=1e-6)


@needs_compiler
def test_writes_nothing_outside_its_columns() -> None:
    student, teacher = logit_pair(5, 100, 0.5)
    out = torch.full((5, 140), 7.0)
    statistics = native.statistics(student, teacher, temperature=1.0)
    peaks, factors = statistics[[0, 2]].float(), (1 / statistics[[1, 3]]).float()
    native.gradient(student, teacher, peaks=peaks, factors=factors, temperature=1.0, out=out[:, 20:120])
    assert (out[:, :20] == 7).all()
    assert (out[:, 120:] == 7).all()
    assert (out[:, 20:120].sum(-1).abs() < 1e-5).all()


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    student, teacher = logit_pair(7, 40000, 0.5)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.statistics(student, teacher, temperature=1.0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_compiler
def test_masked_rows_are_not_read() -> None:
    student, teacher = logit_pair(4, 50, 0.5)
    mask = torch.tensor([True, False, True, False])
    statistics = native.statistics(student, teacher, temperature=1.0, mask=mask)
    assert (statistics[:, ~mask] == 0).all()
    assert torch.equal(statistics[:, mask], native.statistics(student, teacher, temperature=1.0)[:, mask])


TRY = """
    import torch
    from megaqad.losses import vocab_parallel_kl
    print(float(vocab_parallel_kl(torch.zeros(1, 4), torch.ones(1, 4))))
    try:
        vocab_parallel_kl(torch.zeros(1, 4), torch.zeros(1, 4), impl="native")
        print("compiled")
    except ValueError as error:
        print(error)
"""


def run_python(**environment: str) -> list[str]:
    command = [sys.executable, "-c", textwrap.dedent(TRY)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=True, timeout=300
    )
    return done.stdout.splitlines()


def test_without_a_compiler_auto_still_works(tmp_path: Path) -> None:
    lines = run_python(PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert lines == [
        "0.0",
        "impl='native' cannot run: no C++ compiler (set CXX, or install g++); use impl='auto'",
    ]


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    lines = run_python(CXX="false", XDG_CACHE_HOME=str(tmp_path))
    assert lines[0] == "0.0"
    assert "cannot compile native.cpp" in lines[1]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = run_python(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert lines[0] == "0.0"
    assert lines[1].startswith("impl='native' cannot run: NotADirectoryError")


@needs_compiler
def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    assert run_python(XDG_CACHE_HOME=str(tmp_path)) == ["0.0", "compiled"]
    (library,) = (tmp_path / "megaqad").iterdir()
    made = library.stat().st_mtime_ns
    assert run_python(XDG_CACHE_HOME=str(tmp_path), CXX="false") == ["0.0", "compiled"]
    assert library.stat().st_mtime_ns == made
