"""Divergences between a student and its teacher over a vocabulary that is sharded on a process group.

`linear_kl` is what training uses: hidden states and output heads in, exact full-vocabulary KL out, with memory that
does not grow with tokens x vocabulary. `vocab_parallel_kl` is the same loss of logits that exist already.
`linear_divergence` takes any objective of objectives/; `compare_heads` measures without training.

| file | what |
|---|---|
| kl.py | the mathematics of sharded KL; `vocab_parallel_kl` |
| blocks.py | its two local reductions in PyTorch; native.py in C++ (../compiled.py compiles it); kernels.py chooses |
| linear.py | the chunked engine that fuses a loss with the heads; gemm.py (with products.py), inputs.py serve it |
| objectives/ | what can be minimized: KL both ways, Jensen-Shannon, logit MSE, cross entropy, mixtures |
| hidden.py | cosine distance and linear CKA of hidden states, for any pipeline stage |
| metrics.py | `compare_heads` |
| sharding.py | every collective |
| reference.py | all of it again, dense, FP64, by autograd: the test oracle |
"""

from megaqad.losses.hidden import hidden_cka, hidden_cosine
from megaqad.losses.kl import vocab_parallel_kl
from megaqad.losses.linear import linear_cross_entropy, linear_divergence, linear_kl
from megaqad.losses.metrics import TokenMetrics, compare_heads
from megaqad.losses.objectives import CrossEntropy, ForwardKL, JensenShannon, LogitMSE, Mixture, Objective, ReverseKL
from megaqad.losses.objectives import build as build_objective

__all__ = [
    "CrossEntropy",
    "ForwardKL",
    "JensenShannon",
    "LogitMSE",
    "Mixture",
    "Objective",
    "ReverseKL",
    "TokenMetrics",
    "build_objective",
    "compare_heads",
    "hidden_cka",
    "hidden_cosine",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_kl",
    "vocab_parallel_kl",
]
