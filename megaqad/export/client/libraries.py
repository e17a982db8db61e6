"""The same files through other people's code: compressed-tensors, its converter of ModelOpt's layout, llama.cpp.

Each reader answers ``passed``, or ``skipped:`` and why it could say nothing; what it finds wrong it raises. None of
them is needed to run megaqad, so none need be installed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaqad.export.client.checkpoint import Advance, Client, open_export
from megaqad.export.client.files import VerificationError

PASSED = "passed"
REFUSED = 2
"""Exit code of this file as a program."""
MOST_PARAMETERS = 2_000_000_000
"""Of a model that these readers are given: they hold all of it, and take minutes for more."""
LLAMA_CPP_ERROR = 2e-2
"""Relative distance of llama.cpp's logits, which quantizes activations its own way: 0.006 where the file is right (BF16
weights: 0.002), 0.87 with the codes of each byte swapped."""
CONVERTER_SCRIPT = "convert_hf_to_gguf.py"


def _skipped(client: Client, package: str, method: str) -> str | None:
    """Why a reader that needs ``package``, and reads exports of this ``quant_method``, says nothing of this one."""
    found = client.config.get("quantization_config", {}).get("quant_method")
    if found != method:
        return f"skipped: it reads exports with quant_method={method}, this one has {found}"
    if importlib.util.find_spec(package) is None:
        return f"skipped: {package} is not installed"
    if client.size > MOST_PARAMETERS:
        return f"skipped: {client.size / 1e9:.0f}e9 parameters, more than the {MOST_PARAMETERS / 1e9:.0f}e9 it is given"
    return None


def with_compressed_tensors(client: Client, advance: Advance) -> str:
    """transformers loads the export through the compressed-tensors library: nothing is missing or left over, and the
    library's own decompression gives the weights that ``client`` reads, bit for bit in its dtype.

    Raises:
        VerificationError: names what is missing, or the module whose weight differs.
    """
    skipped = _skipped(client, "compressed_tensors", "compressed-tensors")
    if skipped is not None:
        return skipped
    if any(len(parameter.experts) > 1 for parameter in client.parameters.values()):
        # 5.14 reports their scales of whole tensors as unexpected, and computes with what is left.
        return "skipped: transformers stacks experts, and has no place for their scales there"
    # Where a process group exists, the library divides the model among its ranks (``distributed/module_parallel.py``).
    return _in_own_process(client, advance) if dist.is_initialized() else _load_with_compressed_tensors(client, advance)


def _load_with_compressed_tensors(client: Client, advance: Advance) -> str:
    from transformers import AutoModelForCausalLM

    try:
        from compressed_tensors.compressors.base import decompress_module
    except ImportError as error:
        return f"skipped: this release of compressed_tensors is another ({error})"
    expected = client.expected()
    try:
        with _without_progress_bars():
            loaded, found = AutoModelForCausalLM.from_pretrained(
                client.folder,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever it is, this client cannot read the export
        raise VerificationError(
            f"{client.folder}: transformers with compressed-tensors cannot load it ({' '.join(str(error).split())})"
        ) from error
    for what, reported in found.items():
        # what was carried over from the original is nothing that transformers should expect
        names = [name for name in reported if name in expected or name not in client.files]
        if names:
            raise VerificationError(
                f"{client.folder}: transformers with compressed-tensors reports {what} {min(map(str, names))} "
                f"({len(names)} in all); export again"
            )
    modules = dict(loaded.named_modules())
    for done, name in enumerate(client.layouts):
        decompress_module(modules[name])
        _check_equal(client, name, modules[name].weight.detach(), "compressed-tensors")
        advance("compressed-tensors", done + 1, len(client.layouts))
    return PASSED


def _in_own_process(client: Client, advance: Advance) -> str:
    """``_load_with_compressed_tensors`` by this file as a program, which is no rank."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", __name__, str(client.folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            try:
                answer, errors = process.communicate(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                advance("compressed-tensors", 0, len(client.layouts))
    if process.returncode == 0:
        return answer.splitlines()[-1]
    if process.returncode == REFUSED:
        raise VerificationError(answer.splitlines()[-1])
    last = (errors.strip() or "no message").splitlines()[-1]
    raise VerificationError(
        f"{client.folder}: transformers with compressed-tensors ended with {process.returncode} ({last})"
    )


def with_compressed_tensors_converter(client: Client, advance: Advance) -> str:
    """The library's converter from ModelOpt's NVFP4, module by module, and its decompression of what comes out.

    Raises:
        VerificationError: names the module whose weight differs.
    """
    skipped = _skipped(client, "compressed_tensors", "modelopt")
    if skipped is not None:
        return skipped
    modules = [name for name, layout in client.layouts.items() if "weight_scale_2" in layout.tensors]
    if not modules:
        return "skipped: it converts NVFP4, and no module is in it"
    try:
        from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
        from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import NVFP4
    except ImportError as error:
        return f"skipped: this release of compressed_tensors is another ({error})"
    scheme = QuantizationScheme(**NVFP4, targets=["Linear"])
    for done, name in enumerate(modules):
        endings = client.layouts[name].tensors
        stored = {f"{name}.{ending}": client.tensor(f"{name}.{ending}") for ending in endings}
        converted = ModelOptNvfp4Converter(targets=[name]).process(stored)
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in converted.items()}
        if "input_scale" in endings:
            inverse = 1.0 / client.tensor(f"{name}.input_scale")
            if not torch.equal(parts["input_global_scale"], inverse):
                raise VerificationError(f"{client.folder}: the converter reads another scale of {name}'s inputs")
        parts["weight_global_scale"] = parts["weight_global_scale"].reshape(1)  # of shape [] it is taken for BF16
        _check_equal(client, name, NVFP4PackedCompressor.decompress(parts, scheme)["weight"], "the converter", steps=1)
        advance("compressed-tensors' converter", done + 1, len(modules))
    return PASSED


def _check_equal(client: Client, module: str, theirs: Tensor, reader: str, steps: int = 0) -> None:
    """``steps`` of the dtype's precision may lie between them: a reader that divides by the stored 1 / scale multiplies
    by a neighbour of the scale for one tensor in five."""
    ours = client.weight(module).to(theirs.dtype)
    allowed = ours.float().abs() * (steps * torch.finfo(theirs.dtype).eps)
    different = int(((theirs.float() - ours.float()).abs() > allowed).sum())
    if theirs.shape != ours.shape or different:
        raise VerificationError(
            f"{client.folder}: {reader} reads another weight of {module} ({different} of {ours.numel()} values); "
            "export again"
        )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers' own would stand between ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def with_llama_cpp(client: Client, tokens: np.ndarray, weight_only: np.ndarray | None) -> str:
    """llama.cpp converts ModelOpt's layout to its own and computes the logits of one sequence.

    Args:
        tokens: int64 [b, s].
        weight_only: the student's logits with unquantized activations, float32 [b, s, V].

    Raises:
        VerificationError: the logits are too far from the student's.
    """
    skipped = _skipped(client, "llama_cpp", "modelopt")
    if skipped is not None:
        return skipped
    script = shutil.which(CONVERTER_SCRIPT)
    if script is None:
        return f"skipped: llama.cpp's {CONVERTER_SCRIPT} is not on the PATH"
    if weight_only is None:
        return "skipped: no logits of the student to compare with"
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.gguf"
        command = [sys.executable, script, str(client.folder), "--outfile", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # of tokenizers that it does not know, too
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            return f"skipped: {CONVERTER_SCRIPT} does not convert this export ({last})"
        ids = tokens[0].tolist()
        model = Llama(str(target), n_ctx=len(ids), logits_all=True, verbose=False)
        model.eval(ids)
        found = np.array(model.scores[: len(ids)], dtype=np.float64)
    wanted = weight_only[0].astype(np.float64)
    found, wanted = (one - one.mean(-1, keepdims=True) for one in (found, wanted))
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error <= LLAMA_CPP_ERROR:
        raise VerificationError(
            f"{client.folder}: llama.cpp computes other logits than the student (relative error {error:.3g}, limit "
            f"{LLAMA_CPP_ERROR}); export again"
        )
    return PASSED


if __name__ == "__main__":
    try:
        print(_load_with_compressed_tensors(open_export(Path(sys.argv[1])), lambda *progress: None))
    except VerificationError as error:
        print(error)
        sys.exit(REFUSED)
