"""What the interpreter cannot show of the Triton kernels: their compiled code, their absence."""

import json

import pytest
import torch

from megaqad.nvfp4 import quantize
from tests.nvfp4.implementations import TRITON_IS_MISSING, run_python

needs_triton = pytest.mark.skipif(TRITON_IS_MISSING, reason="triton is not installed")


@needs_triton
def test_compiled_code_keeps_to_exact_arithmetic():
    """Compiles for Hopper and Blackwell, which needs no GPU, and reads the assembly.

    No operation flushes subnormals or approximates; multiply-adds are only where the source asks for them; BF16 memory
    traffic is in full 16-byte words.
    """
    program = r"""
        import json, re, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from megaqad.nvfp4 import triton_kernels as t

        pointers = dict(
            x_words="*i32", amax="*fp32", chosen="*fp32", value_words="*i32", codes="*u8", scales="*u8",
            global_scale="*fp32",
        )
        numbers = dict(blocks="i32", blocks_per_row="i32")
        options = dict(enable_fp_fusion=False)
        # The one estimate that is asked for: its operands and results are normal, and what is made of it is exact.
        unwanted = [r"(?<!rcp\.approx)\.ftz", r"div\.(full|approx)", r"mad\.f32"]
        wanted = [
            r"rcp\.approx\.ftz\.f32", r"fma\.rn\.f32", r"div\.rn\.f32", r"[ls][dt]\.global\.v4\.b32",
            r"cvt\.rn\.bf16x2",
        ]
        for capability, per_row in ((90, False), (100, False), (90, True)):
            constants = dict(
                FORMAT="bf16", PER_ROW=per_row, CHOSEN=False, WANT_VALUES=True, WANT_CODES=False, INTERPRETED=False,
                TILE=256, WORDS=8,
            )
            source = ASTSource(
                fn=t._quantize_kernel,
                signature=dict(**pointers, **numbers, **dict.fromkeys(constants, "constexpr")),
                constexprs=constants,
                attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
            )
            ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
            print(json.dumps([{p: len(re.findall(p, ptx)) for p in group} for group in (unwanted, wanted)]))
    """
    lines = run_python(program, TRITON_INTERPRET=None).splitlines()
    assert len(lines) == 3
    for line in lines:
        unwanted, wanted = json.loads(line)
        assert not any(unwanted.values()), unwanted
        assert all(wanted.values()), wanted


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="concerns machines without a GPU")
def test_without_a_gpu_the_kernels_say_where_they_run():
    program = """
        import torch
        from megaqad.nvfp4 import quantize
        try:
            quantize(torch.ones(1, 16), impl="triton")
        except ValueError as error:
            print(error)
    """
    message = "impl='triton' runs on CUDA, not on cpu: use impl='auto', or set TRITON_INTERPRET=1 to debug the kernels"
    assert run_python(program, TRITON_INTERPRET=None).strip() == message


def test_triton_is_optional():
    """A machine without Triton imports the package, quantizes, and hears what impl='triton' lacks."""
    program = """
        import sys, importlib.abc

        class Hide(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(name)

        import torch
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
        sys.meta_path.insert(0, Hide())
        from megaqad.nvfp4 import quantize
        print(quantize(torch.ones(1, 16)).codes.tolist())
        try:
            quantize(torch.ones(1, 16), impl="triton")
        except ValueError as error:
            print(error)
    """
    values, error = run_python(program).strip().splitlines()
    assert values == str(quantize(torch.ones(1, 16)).codes.tolist())
    assert error == "impl='triton' needs Triton: pip install triton, or use impl='auto'"
