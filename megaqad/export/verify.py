"""Did the export keep what was trained? Read the files back as a client would and compare with the student.

Four questions, in the order of their cost: are the files intact (checksums of the writer), are they well formed
(names, dtypes, shapes, scales, both configuration files), are the input scales those of the calibration, and does the
model that they describe compute the student's logits. The last uses transformers, FP32, one sequence at a time, and
none of the code that trains or writes.

Logits in W4A4 are a blunt instrument. Rounding activations to four bits is chaotic: a difference in the last bit flips
a code, which moves the next layer's input, and so on, until the logits differ by as much as two unrelated roundings
do. On a trained 2.4M-parameter Llama, whose logits activation quantization moves by 0.13 (relative), one flipped weight
code moves them by 0.06 and BF16 instead of FP32 arithmetic by 0.11. So the weights are compared with activations left
alone: there a right file is within 1e-6, and one global scale that is 1 % off shows as 4e-3. The W4A4 logits must then
be nearer to the student's than the student's are to its own without activation quantization.
``reference.student_reference`` makes what the student's side needs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaqad.export.client import Client, open_export
from megaqad.export.client_checks import (
    check_cache_scales,
    check_files,
    check_input_scales,
    check_structure,
    check_tensors,
)
from megaqad.export.client_files import VerificationError
from megaqad.export.client_model import load_client_model, round_activations

__all__ = ["Tolerance", "Verification", "VerificationError", "verify"]


@dataclass(frozen=True)
class Tolerance:
    """How far the exported model's logits may be from the student's where both compute the same function smoothly."""

    relative_error: float = 1e-3
    """Norm of the difference over the norm of the student's logits, both centred per token."""
    kl: float = 1e-5
    """Mean KL(student || exported) in nats per token."""


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

    passed: bool
    tensors: int
    """Tensors whose bytes were checked."""
    quantized_modules: int
    weight_only: bool
    tokens: int
    relative_error: float
    """Of the logits as the recipe computes them."""
    kl_to_student: float
    top1_agreement: float
    weights_relative_error: float | None
    """Of the logits with activations left alone; None when the student's were not given."""
    activation_effect: float | None
    """Relative distance of the student's own logits with and without activation quantization: the limit of
    ``relative_error`` in W4A4."""


def verify(
    export_dir: Path,
    *,
    tokens: np.ndarray,
    reference_logits: np.ndarray | Path,
    weight_only_logits: np.ndarray | None = None,
    input_amax: Mapping[str, float] | None = None,
    cache_amax: Mapping[str, float] | None = None,
    report: Path | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Verification:
    """Check an export against the student it was written from. One process, CPU.

    Args:
        export_dir: what ``export_checkpoint`` wrote.
        tokens: int64 [b, s].
        reference_logits: the student's in FP32, float32 [b, s, V], or the .npy file that holds them.
        weight_only_logits: the student's with quantized weights and unquantized activations, float32 [b, s, V], for a
            W4A4 export. Without them the W4A4 logits themselves must lie within ``tolerance``, which only a small
            model in the same arithmetic can.
        input_amax: the student's calibrated input by module name; None leaves the input scales to the logits.
        cache_amax: the same of its keys and values, by the module that makes them.
        report: where to write the result as JSON; written also when the logits disagree.
        tolerance: what counts as agreement of the weights.

    Raises:
        VerificationError: a changed, missing, malformed or extra tensor (named), contradicting configuration files,
            an input scale that was not calibrated so, or logits too far apart.
    """
    check_files(Path(export_dir))
    client = open_export(Path(export_dir))
    tensors = check_tensors(client)
    check_structure(client)
    if input_amax is not None:
        check_input_scales(client, input_amax)
    if cache_amax is not None:
        check_cache_scales(client, cache_amax)
    reference = np.load(reference_logits, mmap_mode="r") if isinstance(reference_logits, Path) else reference_logits
    expected_shape = (*tokens.shape, client.config["vocab_size"])
    for logits in (reference, weight_only_logits):
        if logits is not None and logits.shape != expected_shape:
            raise VerificationError(
                f"the student's logits have shape {list(logits.shape)}, the tokens and the exported vocabulary ask for "
                f"{list(expected_shape)}; compare the same tokens and the same model"
            )
    smooth = weight_only_logits if client.rounds_activations else reference
    whole, weights, effect = _compare_logits(client, tokens, reference, smooth)
    # "<=" and not "not >": a NaN must fail
    passed = _within(whole, tolerance) if effect is None else whole.relative_error <= effect
    result = Verification(
        passed=passed and (weights is None or _within(weights, tolerance)),
        tensors=tensors,
        quantized_modules=len(client.layouts),
        weight_only=client.weight_only,
        tokens=int(tokens.size),
        relative_error=whole.relative_error,
        kl_to_student=whole.kl,
        top1_agreement=whole.top1,
        weights_relative_error=None if weights is None else weights.relative_error,
        activation_effect=effect,
    )
    if report is not None:
        report.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if not result.passed:
        raise VerificationError(
            f"{export_dir}: the exported model does not compute the student's logits: relative error "
            f"{result.relative_error:.3g} (limit {_shown(result.activation_effect, tolerance.relative_error)}), "
            f"{_shown(result.weights_relative_error)} with unquantized activations (limit {tolerance.relative_error}); "
            "check that both come from the same step, then export again"
        )
    return result


def _within(agreement: Agreement, tolerance: Tolerance) -> bool:
    return agreement.relative_error <= tolerance.relative_error and agreement.kl <= tolerance.kl


def _compare_logits(
    client: Client, tokens: np.ndarray, reference: np.ndarray, smooth: np.ndarray | None
) -> tuple[Agreement, Agreement | None, float | None]:
    """Run the exported model, in W4A4 once without and once with the rounding of its inputs.

    Args:
        reference: the student's logits as exported.
        smooth: the same without activation quantization, if known.

    Returns:
        Agreement as exported, agreement without activation quantization, and the student's own relative distance
        between the two; the last two None where they are unknown or, the last, where inputs are not rounded.
    """
    model = load_client_model(client)
    weights = None if smooth is None else _compare(_logits(model, tokens), smooth)
    if not client.rounds_activations:
        assert weights is not None
        return weights, weights, None
    round_activations(client, model)
    whole = _compare(_logits(model, tokens), reference)
    if smooth is None:
        return whole, None, None
    return whole, weights, _compare(iter(torch.from_numpy(np.array(smooth))), reference).relative_error


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: np.ndarray) -> Iterator[Tensor]:
    """[s, V] of each sequence, one at a time."""
    for ids in tokens:
        yield model(torch.from_numpy(np.ascontiguousarray(ids))[None]).logits[0]


@torch.no_grad()
def _compare(logits: Iterator[Tensor], reference: np.ndarray) -> Agreement:
    """Agreement of the ``logits`` [s, V] of each sequence with ``reference`` [b, s, V]."""
    difference = size = kl = agreeing = 0.0
    for found, row in zip(logits, reference, strict=True):
        ours, student = _centred(found.double()), _centred(torch.from_numpy(np.array(row)).double())
        difference += (ours - student).square().sum().item()
        size += student.square().sum().item()
        log_student, log_ours = student.log_softmax(-1), ours.log_softmax(-1)
        kl += (log_student.exp() * (log_student - log_ours)).sum().item()
        agreeing += (ours.argmax(-1) == student.argmax(-1)).sum().item()
    tokens = reference.shape[0] * reference.shape[1]
    return Agreement(relative_error=(difference / size) ** 0.5, kl=kl / tokens, top1=agreeing / tokens)


def _shown(value: float | None, otherwise: float | None = None) -> str:
    """A number for a message."""
    value = otherwise if value is None else value
    return "unknown" if value is None else f"{value:.3g}"


def _centred(logits: Tensor) -> Tensor:
    """Logits [s, V] without their mean per token, which no probability depends on."""
    return logits - logits.mean(-1, keepdim=True)
