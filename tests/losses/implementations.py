"""The implementations, those that cannot run here marked with the reason."""

import importlib.util

import pytest

from megaqad.losses import native

WITHOUT_COMPILER = native.unavailable()
WITHOUT_TRITON = "triton is not installed" if importlib.util.find_spec("triton") is None else None


def _needs(name: str, missing: str | None):
    return pytest.param(name, marks=pytest.mark.skipif(missing is not None, reason=f"impl={name!r}: {missing}"))


def with_layout(impl, layout: tuple[int, bool]):
    """A parameter of (impl, world size, sequence parallel) that keeps the mark of `impl`."""
    return pytest.param(*impl.values, *layout, marks=impl.marks)


NATIVE = _needs("native", WITHOUT_COMPILER)
TRITON = _needs("triton", WITHOUT_TRITON)
FAST_IMPLEMENTATIONS = ["torch", NATIVE, TRITON]
IMPLEMENTATIONS = ["reference", *FAST_IMPLEMENTATIONS]
