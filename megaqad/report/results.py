"""What a report is made from: measured columns, training curves, per-layer errors, and the facts of the run.

The columns are means over the same held-out tokens, from FP32 logits:

    kl_to_teacher     KL(teacher || model) in nats per token; 0 for the teacher itself
    cross_entropy     nats per token against the text
    top1_agreement    share of positions where the model's most likely token is the teacher's, 0 to 1

KL is the number to decide by. Cross entropy cannot see drift: a model fine-tuned on the text may reach the teacher's
cross entropy while its distribution moves away from the teacher's (arXiv 2601.20088).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.quantization.allocation import GroupKL

COLUMNS_FILE = "columns.json"
"""What ``recover`` measured, before it becomes ``recovery.json``."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model's held-out means. Errors: `ValueError` for a value that cannot be: NaN, negative, a share above 1."""

    kl_to_teacher: float
    cross_entropy: float
    top1_agreement: float
    tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} is not a number to report: look at the evaluation that measured it")
        if not 0 <= self.top1_agreement <= 1:
            raise ValueError(f"top1_agreement={self.top1_agreement} is no share: it must lie between 0 and 1")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: a column must be measured on at least one token")


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What the report uses of a row of `metrics.jsonl`. `loss` is KL for QAD, cross entropy for QAT."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """A held-out measurement during training, after `step` steps."""

    step: int
    kl_to_teacher: float
    cross_entropy: float


@dataclass(frozen=True)
class Curve:
    """The course of one training run."""

    steps: tuple[StepRow, ...] = ()
    validation: tuple[ValidationRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What the recipe does to one weight.

    module: Hugging Face names, joined by ", " where one GEMM holds several. relative_error: |Q(W) - W| / |W| in
    Frobenius norms. bits: bits per weight with block scales, 16 for a layer kept in BF16.
    """

    module: str
    relative_error: float
    bits: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.relative_error):
            raise ValueError(f"the quantization error of {self.module} is {self.relative_error}: its weight is broken")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. summary: what follows "Export verified:", as in "the same logits over 512 tokens"."""

    passed: bool
    summary: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How the run was made; strings appear as they are."""

    model: str
    parameters: int
    data: str
    layout: str
    recipe: str
    steps: int
    tokens: int
    seconds: float
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    verification: Verification | None = None


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Everything a report shows. qat, its curve and what is known of the layers may be missing; nothing else may."""

    bf16: Column
    ptq: Column
    qad: Column
    facts: RunFacts
    qat: Column | None = None
    qad_curve: Curve = field(default_factory=Curve)
    qat_curve: Curve = field(default_factory=Curve)
    layer_errors: tuple[LayerError, ...] = ()
    sensitivity: tuple[GroupKL, ...] = ()

    @property
    def columns(self) -> dict[str, Column]:
        """The measured columns in the order of `recovery.json`; `qat` only when there is one."""
        measured = {"bf16": self.bf16, "ptq": self.ptq, "qat": self.qat, "qad": self.qad}
        return {name: column for name, column in measured.items() if column is not None}


def recovery_json(results: RunResults) -> str:
    """The text of `recovery.json`: one object per column, full precision."""
    return json.dumps({name: asdict(column) for name, column in results.columns.items()}, indent=2) + "\n"


def read_curve(path: Path) -> Curve:
    """Read `metrics.jsonl`.

    A row with a `loss` is a step; a row with an object `validation` (in a step's row or in one of its own) is a
    held-out measurement. Further keys are for other readers. Errors: `UserError` naming the line that is neither.
    """
    steps: list[StepRow] = []
    validation: list[ValidationRow] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"{row!r} is no object")
            if row.get("loss") is not None:  # null: a step that was skipped because its loss was not finite
                steps.append(StepRow(**_picked(StepRow, row)))
            if "validation" in row:
                validation.append(ValidationRow(**_picked(ValidationRow, {"step": row["step"], **row["validation"]})))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} line {number} is no row of metrics ({error}): the file was cut or edited"
            ) from None
    return Curve(tuple(steps), tuple(validation))


def _picked(kind: type[StepRow] | type[ValidationRow], row: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: row[f.name] for f in fields(kind)}
