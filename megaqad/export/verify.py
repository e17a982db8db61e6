"""Did the export keep what was trained? Read the files back as a client would and compare with the student.

Three questions, in the order of their cost: are the files intact (checksums of the writer), are they well formed
(names, dtypes, shapes, scales, both configuration files), and does the model that they describe compute the student's
logits. The last uses transformers, FP32, one sequence at a time, and none of the code that trains or writes.

The student computes in its own dtype and layout, so its logits differ from FP32 ones by rounding, which NVFP4
amplifies: a last-bit difference can flip a code. ``Tolerance`` is set from measurements of that, and lies far below
what a wrong scale, a swapped nibble or a lost tensor does.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaqad.export.client import (
    VerificationError,
    check_files,
    check_structure,
    check_tensors,
    load_client_model,
    open_export,
)

__all__ = ["Tolerance", "Verification", "VerificationError", "verify"]


@dataclass(frozen=True)
class Tolerance:
    """How far the exported model's logits may be from the student's."""

    relative_error: float = 0.01
    """Norm of the difference over the norm of the student's logits, both centred per token."""
    kl: float = 1e-4
    """Mean KL(student || exported) in nats per token."""


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
    kl_to_student: float
    """KL(student || exported), nats per token."""
    top1_agreement: float


def verify(
    export_dir: Path,
    *,
    tokens: np.ndarray,
    reference_logits: np.ndarray | Path,
    report: Path | None = None,
    tolerance: Tolerance = Tolerance(),
) -> Verification:
    """Check an export against the student it was written from. One process, CPU.

    Args:
        export_dir: what ``export_modelopt`` wrote.
        tokens: int64 [b, s].
        reference_logits: the student's logits, float32 [b, s, V], or the .npy file that holds them.
        report: where to write the result as JSON; written also when the logits disagree.
        tolerance: what counts as agreement.

    Raises:
        VerificationError: a changed, missing, malformed or extra tensor (named), contradicting configuration files,
            or logits further apart than ``tolerance``.
    """
    check_files(Path(export_dir))
    client = open_export(Path(export_dir))
    tensors = check_tensors(client)
    check_structure(client)
    reference = np.load(reference_logits, mmap_mode="r") if isinstance(reference_logits, Path) else reference_logits
    vocab_size = client.config["vocab_size"]
    if reference.shape != (*tokens.shape, vocab_size):
        raise VerificationError(
            f"the student's logits have shape {list(reference.shape)}, the tokens and the exported vocabulary ask for "
            f"{[*tokens.shape, vocab_size]}; compare the same tokens and the same model"
        )
    relative_error, kl, agreement = _compare(load_client_model(client), tokens, reference)
    # not ">": a NaN must fail
    passed = relative_error <= tolerance.relative_error and kl <= tolerance.kl
    result = Verification(
        passed=passed,
        tensors=tensors,
        quantized_modules=len(client.quantized),
        weight_only=client.weight_only,
        tokens=int(tokens.size),
        relative_error=relative_error,
        kl_to_student=kl,
        top1_agreement=agreement,
    )
    if report is not None:
        report.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if not passed:
        raise VerificationError(
            f"{export_dir}: the exported model does not compute the student's logits: relative error "
            f"{relative_error:.3g} (limit {tolerance.relative_error}), KL {kl:.3g} (limit {tolerance.kl}); "
            "check that both come from the same step, then export again"
        )
    return result


@torch.no_grad()
def _compare(model: torch.nn.Module, tokens: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """(relative error, mean KL, top-1 agreement) over all tokens, one sequence at a time."""
    difference = size = kl = agreeing = 0.0
    for ids, row in zip(tokens, reference, strict=True):
        ours: Tensor = model(torch.from_numpy(np.ascontiguousarray(ids))[None]).logits[0].double()
        student = torch.from_numpy(np.array(row)).double()
        ours, student = _centred(ours), _centred(student)
        difference += (ours - student).square().sum().item()
        size += student.square().sum().item()
        log_student, log_ours = student.log_softmax(-1), ours.log_softmax(-1)
        kl += (log_student.exp() * (log_student - log_ours)).sum().item()
        agreeing += (ours.argmax(-1) == student.argmax(-1)).sum().item()
    return (difference / size) ** 0.5, kl / tokens.size, agreeing / tokens.size


def _centred(logits: Tensor) -> Tensor:
    """Logits [s, V] without their mean per token, which no probability depends on."""
    return logits - logits.mean(-1, keepdim=True)
