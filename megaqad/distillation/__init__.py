"""The step no trainer brings: a teacher pass, a student pass under any pipeline schedule, and what joins them."""

from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.step import DistillationStep, Objective, StepResult

__all__ = ["DistillationStep", "Objective", "StepResult", "forward_hidden"]
