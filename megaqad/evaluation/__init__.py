"""Held-out numbers: how far a student is from its teacher, over the same tokens for every student."""

from megaqad.evaluation.evaluate import Evaluation, Evaluator

__all__ = ["Evaluation", "Evaluator"]
