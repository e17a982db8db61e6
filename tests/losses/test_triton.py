"""What the interpreter cannot show of the Triton kernels: that they compile for real GPUs, without spills."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megaqad.losses import blocks
from tests.losses.implementations import WITHOUT_TRITON

needs_triton = pytest.mark.skipif(WITHOUT_TRITON is not None, reason=str(WITHOUT_TRITON))


def run_python(program: str, **environment: str) -> str:
    """A fresh process: Triton decides once, when it is imported, whether to interpret."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = r"""
import pathlib, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megaqad.losses import triton_kernels as t
from megaqad.models import rotary_kernel as r

BF16, FP32, I32 = "*bf16", "*fp32", "i32"
strides = dict(student_stride=I32, teacher_stride=I32)
counts = dict(tokens=I32, columns=I32)
kernels = {
    "statistics": (
        t._statistics,
        dict(student=BF16, teacher=BF16, mask="*i1", out=FP32, **counts, **strides, scale="fp32"),
        dict(WITH_TEACHER=True, WITH_MASK=False, LANES=t._LANES, WIDTH=t._LOAD_BYTES // int(WIDE)),
        dict(enable_fp_fusion=True),
    ),
    "gradient": (
        t._gradient,
        dict(student=BF16, teacher=BF16, out=BF16, peaks=FP32, factors=FP32, **counts, **strides, out_stride=I32,
             scale="fp32"),
        dict(WITH_TEACHER=True, ROUND_TO_BF16=False, TILE=t._GRADIENT_TILE),
        dict(enable_fp_fusion=False),
    ),
    "merge": (
        t._merge,
        dict(gathered=FP32, token_kl="*fp64", peaks=FP32, sums="*fp64", tokens=I32, ranks=I32, rank_stride=I32,
             statistic_stride=I32),
        dict(TEMPERATURE=0.7, TILE=t._MERGE_TILE),
        dict(),
    ),
    "rotary": (
        r._rotate_kernel,
        dict(x=BF16, cos=BF16, sin=BF16, out=BF16, batch=I32, heads=I32, stride_s=I32, stride_b=I32, stride_n=I32,
             table_stride=I32, half=I32, dim=I32),
        dict(BACKWARD=True, HEADS=r._HEADS, HALF=32, KEPT=16),
        dict(),
    ),
}
folder, element = pathlib.Path(sys.argv[1]), sys.argv[2]
for name, (fn, signature, constants, options) in kernels.items():
    signature = {k: ("*" + element if v == BF16 else v) for k, v in signature.items()}
    aligned = [i for i, v in enumerate(signature.values()) if v.startswith("*") or v == I32]
    source = ASTSource(
        fn=fn, signature=dict(**signature, **dict.fromkeys(constants, "constexpr")), constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    for capability in (90, 100):
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=t._WARPS, **options))
        (folder / f"{name}.{capability}.ptx").write_text(compiled.asm["ptx"])
"""


def hot_loop(ptx: str) -> str:
    """The instructions between the target of the backward branch and that branch."""
    for branch in re.finditer(r"bra\S*\s+(\$L__BB0_\d+);", ptx):
        start = ptx.find(f"{branch.group(1)}:")
        if 0 <= start < branch.start():
            return ptx[start : branch.end()]
    raise AssertionError("no loop")


def assembled(ptx: Path) -> str:
    """What the assembler reports of registers and spills."""
    import triton

    # triton names the assembler after the architectures it serves
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    architecture = re.search(r"\.target (sm_\w+)", ptx.read_text()).group(1)
    for tool in sorted(tools.glob("ptxas*")):
        command = [str(tool), "-v", f"-arch={architecture}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stderr
    raise AssertionError(f"no assembler for {architecture}: {done.stderr}")


@needs_triton
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_compiles_for_hopper_and_blackwell_without_spills(tmp_path: Path, element: str) -> None:
    program = COMPILE.replace("sys.argv[1]", repr(str(tmp_path))).replace("sys.argv[2]", repr(element))
    program = program.replace("WIDE", "2" if element == "bf16" else "4")
    run_python(program)
    compiled = sorted(tmp_path.glob("*.ptx"))
    assert [path.name for path in compiled] == [
        f"{name}.{capability}.ptx" for name in ("gradient", "merge", "rotary", "statistics") for capability in (100, 90)
    ]
    for path in compiled:
        report = assembled(path)
        assert "0 bytes spill stores, 0 bytes spill loads" in report, f"{path.name}: {report}"
        registers = int(re.search(r"Used (\d+) registers", report).group(1))
        print(path.name, registers, "registers")
        if path.name.startswith(("merge", "rotary")):
            continue
        assert registers <= 64, f"{path.name}: eight warps of more registers leave too few in flight to hide memory"
        ptx = path.read_text()
        assert re.search(r"ld\.global\.v4\.b32", ptx), "reads full 16-byte words"
        if path.name.startswith("statistics"):
            loop = hot_loop(ptx)
            assert "ex2.approx" in loop
            assert "bar.sync" not in loop, "lanes meet at the end of the row, not at every tile"
            assert "shfl" not in loop, "a lane's columns are one thread's"
        if path.name.startswith("gradient"):
            assert not re.search(r"fma\.rn\.f32", ptx), "equal products must round alike"


@needs_triton
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ranks", [1, 3])
def test_merges_as_pytorch_does(ranks: int, temperature: float) -> None:
    """In the interpreter; a shard without columns and NaN among what is merged."""
    from megaqad.losses import triton_kernels

    logits = 5 * torch.randn(2, ranks, 300, 40, dtype=torch.float64)
    logits[:, 0, 7] = -torch.inf
    logits[1, -1, 9, 3] = torch.nan
    local = [blocks.statistics(*shard, temperature=temperature) for shard in logits.unbind(1)]
    gathered = torch.stack(local).float()[:, :, 5:]  # a slice, as of some tokens
    expected = blocks.merge(gathered, temperature=temperature)
    found = triton_kernels.merge(gathered, temperature=temperature)
    torch.testing.assert_close(found.token_kl, expected.token_kl, rtol=1e-12, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(found.peaks, expected.peaks, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-14, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="concerns machines without a GPU")
def test_without_a_gpu_it_says_where_it_runs() -> None:
    program = """
        import torch
        from megaqad.losses import vocab_parallel_kl
        try:
            vocab_parallel_kl(torch.zeros(1, 4), torch.zeros(1, 4), impl="triton")
        except ValueError as error:
            print(error)
    """
    told = run_python(program).strip()
    assert told.startswith("impl='triton' cannot run: it runs on CUDA, not on cpu")
    assert "\n" not in told


def test_triton_is_optional() -> None:
    program = """
        import importlib.util, sys
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "triton" else original(name, *rest)
        sys.modules["triton"] = None
        import torch
        from megaqad.losses import vocab_parallel_kl
        print(float(vocab_parallel_kl(torch.zeros(1, 4), torch.zeros(1, 4))))
        try:
            vocab_parallel_kl(torch.zeros(1, 4), torch.zeros(1, 4), impl="triton")
        except ValueError as error:
            print(error)
    """
    lines = run_python(program, TRITON_INTERPRET="1").splitlines()
    assert lines == ["0.0", "impl='triton' cannot run: triton is not installed; use impl='auto'"]
