"""Did the export keep what was trained? Read the files back as others do and compare with the student.

Several readers, in the order of their cost, each with its own code: ours of the files themselves (checksums of the
writer, names, dtypes, shapes), the rules of engines, other people's libraries, and transformers, whose model of the
config, with the stored weights, must compute the student's logits. None of them shares code with what trains or writes.

Logits in W4A4 are a blunt instrument. Rounding activations to four bits is chaotic: a difference in the last bit flips
a code, which moves the next layer's input, and so on, until the logits differ by as much as two unrelated roundings
do. On a trained 2.4M-parameter Llama, whose logits activation quantization moves by 0.12 (relative), one flipped weight
code moves them by 0.06 and BF16 instead of FP32 arithmetic by 0.12. So the weights are compared with activations left
alone: there a right file is within 2e-6 in FP32, and one global scale that is 1 % off shows as 4e-3. The W4A4 logits
must then be about as near to the student's as the student's are to its own without activation quantization.

In FP32 both sides need FP32 copies: the ranks of the student, transformers of a layer. Above ``FP32_MOST`` parameters
both compute in BF16 instead, in which a right file lies within 0.03 (48 layers, random weights; 0.008 in 4, trained):
the comparison then finds tensors that are swapped, transposed or wrongly unpacked, and no longer a scale that is a
little off. ``reference.student_reference`` makes what the student's side needs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaqad.export.client.checkpoint import Advance, Client, check_files, check_tensors, open_export
from megaqad.export.client.files import VerificationError
from megaqad.export.client.libraries import (
    PASSED,
    with_compressed_tensors,
    with_compressed_tensors_converter,
    with_llama_cpp,
)
from megaqad.export.client.model import TOKENS_AT_ONCE, ClientModel, StreamedModel, WholeModel, round_activations
from megaqad.export.client.rules import check_rules, check_values
from megaqad.runtime.memory import available_memory

__all__ = ["FP32_MOST", "MODELS", "Tolerance", "Verification", "VerificationError", "arithmetic", "verify"]

MODELS = ("auto", "full", "streamed", "files")
"""How much of the model is run; ``auto`` chooses one of the next two."""
LIBRARIES = ("compressed_tensors", "compressed_tensors_converter", "llama_cpp")
"""Readers that are other people's."""
FULL_SHARE = 1 / 3
"""Of the available memory that the whole model may take before it is streamed."""
FP32_MOST = 32_000_000_000
"""Parameters up to which student and export are compared in FP32. It costs the ranks 8 bytes for each, a copy and its
quantized weights, beside what training holds."""
UNRELATED_ROUNDINGS = 1.5
"""Distance of two W4A4 computations of one function, as a multiple of their distance from the unrounded one: up to the
square root of 2 where every rounding differs (found: 1.0)."""


def arithmetic(parameters: int) -> torch.dtype:
    """In which a model of this size is compared."""
    return torch.float32 if parameters <= FP32_MOST else torch.bfloat16


@dataclass(frozen=True)
class Tolerance:
    """How far the exported model's logits may be from the student's where both compute the same function smoothly."""

    relative_error: float
    """Norm of the difference over the norm of the student's logits, both centred per token."""
    kl: float
    """Mean KL(student || exported) in nats per token."""


TOLERANCES = {torch.float32: Tolerance(1e-3, 1e-5), torch.bfloat16: Tolerance(0.1, 0.02)}


@dataclass(frozen=True)
class Agreement:
    """How near two models' logits are, over all tokens."""

    relative_error: float
    kl: float
    """KL(student || exported), nats per token."""
    top1: float


@dataclass(frozen=True)
class Verification:
    """What was found; written to verify.json."""

    passed: bool = False
    summary: str = ""
    """In one sentence."""
    readers: Mapping[str, str] = field(default_factory=dict)
    """Result of each independent reader: ``passed``, or ``skipped:`` or ``failed:`` and why."""
    model: str | None = None
    """How transformers ran it: ``full``, ``streamed``, or None."""
    arithmetic: str | None = None
    """In which dtype."""
    tensors: int = 0
    """Tensors whose bytes were checked."""
    quantized_modules: int = 0
    weight_only: bool = False
    tokens: int = 0
    relative_error: float | None = None
    """Of the logits as the recipe computes them."""
    kl_to_student: float | None = None
    top1_agreement: float | None = None
    weights_relative_error: float | None = None
    """Of the logits with activations left alone; None when the student's were not given."""
    activation_effect: float | None = None
    """Relative distance of the student's own logits with and without activation quantization, by which
    ``relative_error`` is judged in W4A4."""


def verify(
    export_dir: Path,
    *,
    tokens: np.ndarray,
    reference_logits: np.ndarray | None,
    weight_only_logits: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    input_amax: Mapping[str, float] | None = None,
    cache_amax: Mapping[str, float] | None = None,
    model: str = "auto",
    original: Path | None = None,
    report: Path | None = None,
    advance: Advance = lambda doing, done, total: None,
) -> Verification:
    """Check an export against the student it was written from. One process, CPU.

    Args:
        export_dir: what ``export_checkpoint`` wrote.
        tokens: int64 [b, s].
        reference_logits: the student's, float32 [b, s, V]; needed unless ``model`` is ``files``.
        weight_only_logits: the student's with quantized weights and unquantized activations, float32 [b, s, V], for a
            W4A4 export. Without them the W4A4 logits themselves must lie within the tolerance, which only a small
            model in the same arithmetic can.
        dtype: in which the student's logits were computed (``arithmetic``); transformers follows.
        input_amax: the student's calibrated input by module name; None leaves the input scales to the logits.
        cache_amax: the same of its keys and values, by the module that makes them.
        model: one of ``MODELS``; ``auto`` is ``full`` where the model takes less than a third of the available memory.
        original: the checkpoint that was quantized, which the export may hold more tensors of.
        report: where to write the result as JSON, whatever it is.
        advance: told of progress.

    Raises:
        VerificationError: a changed, missing, malformed or extra tensor (named), contradicting configuration files,
            an input scale that was not calibrated so, a reader that finds something else, or logits too far apart.
    """
    findings = _Findings(report)
    with findings.of("safetensors"):
        check_files(Path(export_dir))
        client = open_export(Path(export_dir))
        tensors = check_tensors(client, original, partial(check_values, client), advance)
        findings.note(tensors=tensors, quantized_modules=len(client.layouts), weight_only=client.weight_only)
    with findings.of("engine_rules"):
        check_rules(client)
    with findings.of("scales") as answer:
        answer("skipped: the student's are not given" if input_amax is None else PASSED)
        check_calibrated(client, input_amax, cache_amax)
    with findings.of("compressed_tensors") as answer:
        answer(with_compressed_tensors(client, advance))
    with findings.of("compressed_tensors_converter") as answer:
        answer(with_compressed_tensors_converter(client, advance))
    smooth = weight_only_logits if client.rounds_activations else reference_logits
    with findings.of("transformers") as answer:
        if model == "files":
            answer("skipped: verify.model=files")
        else:
            assert reference_logits is not None
            _check_shape(client, tokens, reference_logits, weight_only_logits)
            chosen = _choice(model, client, dtype)
            findings.note(model=chosen, arithmetic=str(dtype).removeprefix("torch."), tokens=int(tokens.size))
            transformers = (WholeModel if chosen == "full" else StreamedModel)(client, dtype, advance)
            _compare_logits(findings, client, transformers, tokens, reference_logits, smooth, TOLERANCES[dtype])
    with findings.of("llama_cpp") as answer:
        answer(with_llama_cpp(client, tokens, smooth))
    return findings.passed()


class _Findings:
    """What is known so far; written to the report when a reader fails, and at the end."""

    def __init__(self, report: Path | None) -> None:
        self._report = report
        self._readers: dict[str, str] = {}
        self._found = Verification(readers=self._readers)

    def note(self, **facts: Any) -> None:
        self._found = replace(self._found, **facts)

    @contextmanager
    def of(self, reader: str) -> Iterator[Callable[[str], None]]:
        """Whatever a reader does stands in this block; it may ``answer(..)`` something else than ``passed``."""
        self._readers[reader] = PASSED
        try:
            yield partial(self._readers.__setitem__, reader)
        except VerificationError as error:
            self._readers[reader] = f"failed: {error}"
            self.note(summary=str(error))
            self._write()
            raise

    def passed(self) -> Verification:
        """All readers are through."""
        found = self._found
        others = [name for name in LIBRARIES if self._readers[name] == PASSED]
        summary = f"{found.tensors} tensors intact" + (f", read by {' and '.join(others)} too" if others else "")
        if found.model is None:
            summary += "; no logits were compared (verify.model=files)"
        else:
            summary += (
                f"; transformers computes the student's logits over {found.tokens} tokens, relative error "
                f"{found.relative_error:.1e}, KL {found.kl_to_student:.1e}"
            )
        self.note(passed=True, summary=summary)
        self._write()
        return self._found

    def _write(self) -> None:
        if self._report is not None:
            self._report.write_text(json.dumps(asdict(self._found), indent=2) + "\n", encoding="utf-8")


def check_calibrated(
    client: Client, input_amax: Mapping[str, float] | None, cache_amax: Mapping[str, float] | None
) -> None:
    """Every stored scale of inputs, keys and values is the student's calibrated amax over the format's range, to the
    last bit but two; without stored scales of keys and values, the student's are 1 too.

    Raises:
        VerificationError: names the module.
    """
    for module, layout in client.layouts.items():
        if layout.input_scale is not None and input_amax is not None:
            name = f"{module}.{layout.input_scale}"
            _check_scale(client, name, layout.amax, input_amax.get(module), "input")
    if client.cache is None or cache_amax is None:
        return
    for name, module in client.cache.modules.items():
        if client.has_cache_scales:
            _check_scale(client, name, lambda scale: scale * 448.0, cache_amax.get(module), "output")
        elif cache_amax.get(module) != 448.0:
            raise VerificationError(
                f"{client.folder}: tensor {name} is missing, which means a scale of 1, while the student's amax is "
                f"{cache_amax.get(module)!r}; export again"
            )


def _check_scale(client: Client, name: str, amax_of: Callable[[float], float], amax: float | None, what: str) -> None:
    scale = client.tensor(name).item()
    if amax is None or abs(amax_of(scale) / amax - 1.0) > 2**-22:
        raise VerificationError(
            f"{client.folder}: tensor {name} is {scale!r}, which stands for an amax of {amax_of(scale)!r}; the "
            f"student's calibrated {what} amax is {amax!r}; export again"
        )


def _check_shape(client: Client, tokens: np.ndarray, *logits: np.ndarray | None) -> None:
    expected = (*tokens.shape, client.config["vocab_size"])
    for given in logits:
        if given is not None and given.shape != expected:
            raise VerificationError(
                f"the student's logits have shape {list(given.shape)}, the tokens and the exported vocabulary ask for "
                f"{list(expected)}; compare the same tokens and the same model"
            )


def _choice(model: str, client: Client, dtype: torch.dtype) -> str:
    """``full`` or ``streamed``."""
    assert model in MODELS, model
    if model != "auto":
        return model
    return "full" if client.size * dtype.itemsize <= FULL_SHARE * available_memory() else "streamed"


def _compare_logits(
    findings: _Findings,
    client: Client,
    model: ClientModel,
    tokens: np.ndarray,
    reference: np.ndarray,
    smooth: np.ndarray | None,
    tolerance: Tolerance,
) -> None:
    """Run the exported model, in W4A4 once without and once with the rounding of its inputs.

    Args:
        reference: the student's logits as exported.
        smooth: the same without activation quantization, if known.

    Raises:
        VerificationError: they are too far apart.
    """
    ids = torch.from_numpy(np.ascontiguousarray(tokens))
    weights = effect = None
    if smooth is not None:
        weights = _compare(model.logits(ids), smooth)
        effect = _compare((torch.from_numpy(np.array(row)) for row in smooth), reference).relative_error
    whole, limit = weights, tolerance.relative_error
    if client.rounds_activations:
        round_activations(client, model.module)
        whole = _compare(model.logits(ids), reference)
        limit = limit if effect is None else UNRELATED_ROUNDINGS * effect
    assert whole is not None
    findings.note(
        relative_error=whole.relative_error,
        kl_to_student=whole.kl,
        top1_agreement=whole.top1,
        weights_relative_error=None if weights is None else weights.relative_error,
        activation_effect=effect if client.rounds_activations else None,
    )
    judged = whole if weights is None else weights
    # "<=" and not "not >": a NaN must fail
    smooth_passes = judged.relative_error <= tolerance.relative_error and judged.kl <= tolerance.kl
    if not (smooth_passes and whole.relative_error <= limit):
        shown = "unknown" if weights is None else f"{weights.relative_error:.3g}"
        raise VerificationError(
            f"{client.folder}: the exported model does not compute the student's logits: relative error "
            f"{whole.relative_error:.3g} (limit {limit:.3g}), {shown} with unquantized activations (limit "
            f"{tolerance.relative_error}); check that both come from the same step, then export again"
        )


@torch.no_grad()
def _compare(logits: Iterable[Tensor], reference: np.ndarray) -> Agreement:
    """Agreement of ``logits``, [n, V] of some tokens at a time, with ``reference`` [b, s, V]."""
    rows, compared = reference.reshape(-1, reference.shape[-1]), 0
    difference = size = kl = agreeing = 0.0
    for found in (part for some in logits for part in some.split(TOKENS_AT_ONCE)):
        row = np.array(rows[compared : compared + len(found)])
        compared += len(found)
        ours, student = _centred(found.double()), _centred(torch.from_numpy(row).double())
        difference += (ours - student).square().sum().item()
        size += student.square().sum().item()
        log_student, log_ours = student.log_softmax(-1), ours.log_softmax(-1)
        kl += (log_student.exp() * (log_student - log_ours)).sum().item()
        agreeing += (ours.argmax(-1) == student.argmax(-1)).sum().item()
    assert compared == len(rows), (compared, len(rows))
    return Agreement(relative_error=(difference / size) ** 0.5, kl=kl / compared, top1=agreeing / compared)


def _centred(logits: Tensor) -> Tensor:
    """Logits [n, V] without their mean per token, which no probability depends on."""
    return logits - logits.mean(-1, keepdim=True)
