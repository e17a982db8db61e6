"""The report: one page, one JSON and a few pictures from which a person can decide whether to ship the model."""

from megaqad.report.pictures import draw_sensitivity
from megaqad.report.results import (
    COLUMNS_FILE,
    Column,
    Curve,
    LayerError,
    RunFacts,
    RunResults,
    StepRow,
    ValidationRow,
    Verification,
    read_curve,
    recovery_json,
)
from megaqad.report.write import recovery_table, write_report

__all__ = [
    "COLUMNS_FILE",
    "Column",
    "Curve",
    "LayerError",
    "RunFacts",
    "RunResults",
    "StepRow",
    "ValidationRow",
    "Verification",
    "draw_sensitivity",
    "read_curve",
    "recovery_json",
    "recovery_table",
    "write_report",
]
