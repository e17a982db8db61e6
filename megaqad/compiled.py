"""C++ beside Python: compiled once per machine with the compiler it has, into a cache, and called through ctypes.

`load` compiles a source in two to four seconds into `$XDG_CACHE_HOME/megaqad` (default `~/.cache/megaqad`) under a name
made of the source, its headers, the flags and the processor's features. Without a compiler, or where the cache cannot
be written, it says so and callers take another path. OpenMP comes from the runtime that PyTorch has already loaded, so
all share one set of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

VECTORS = Path(__file__).with_name("vectors.h")
"""A header for sources that work in vectors of the machine's width."""
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_COMPILE_SECONDS = 120


def _processor() -> str:
    """What -march=native depends on: a cache shared by different machines must not mix their code."""
    features = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for name in (named, "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


def _compile(compiler: str, source: Path, flags: tuple[str, ...], library: Path) -> None:
    """Compile beside the target and rename: many ranks may do this at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        # libraries are named behind what needs them
        command = [compiler, *_FLAGS, str(source), *flags, "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        fresh.replace(library)


@functools.cache
def load(source: Path, flags: tuple[str, ...], headers: tuple[Path, ...] = ()) -> ctypes.CDLL | str:
    """The library of `source`, or in words why there is none.

    `flags`: for the compiler, besides the common ones. `headers`: of ours that it includes.
    """
    texts = [path.read_text() for path in (source, *headers)]
    key = hashlib.sha256(f"{texts}{_FLAGS}{flags}{_processor()}".encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaqad"
        library = cache / f"{source.parent.name}-{source.stem}-{key}.so"
        if not library.exists():
            compiler = _compiler()
            if compiler is None:
                return "no C++ compiler (set CXX, or install g++)"
            _compile(compiler, source, flags, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} cannot compile {source.name}: {str(error.stderr).strip().splitlines()[-1:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def reason(loaded: ctypes.CDLL | str) -> str | None:
    """Why there is no library; None if there is one."""
    return loaded if isinstance(loaded, str) else None


def library(loaded: ctypes.CDLL | str) -> ctypes.CDLL:
    """What `load` gave where `reason` was asked before."""
    assert not isinstance(loaded, str), loaded
    return loaded


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where its first element is; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
