"""What can be minimized. Each is exact over a sharded vocabulary; base.py says how the engine drives them."""

from megaqad.losses.objectives.base import Objective
from megaqad.losses.objectives.cross_entropy import CrossEntropy
from megaqad.losses.objectives.divergences import ForwardKL, ReverseKL
from megaqad.losses.objectives.jensen_shannon import JensenShannon
from megaqad.losses.objectives.mean_squared import LogitMSE
from megaqad.losses.objectives.mixture import Mixture, build

__all__ = ["CrossEntropy", "ForwardKL", "JensenShannon", "LogitMSE", "Mixture", "Objective", "ReverseKL", "build"]
