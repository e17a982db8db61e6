"""What the loss tests measure against: PyTorch's own functions in FP64, dense, differentiated by autograd.

Independent of megaqad on purpose: megaqad's reference is under test here too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = -1e30


def dense_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """FP64 KL(teacher || student) of whole-vocabulary logits [n, V] -> [n]; -inf columns have no probability."""
    log_s = F.log_softmax(student.double().clamp(min=FLOOR) / temperature, dim=-1)
    log_t = F.log_softmax(teacher.double().clamp(min=FLOOR) / temperature, dim=-1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def dense_kl_and_gradient(
    student: Tensor, teacher: Tensor, scale: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """KL [n] and the gradient [n, V] of sum(scale * KL), both FP64; tokens of scale 0 are not looked at."""
    keep = scale != 0
    leaf = student[keep].double().requires_grad_()
    kl = dense_kl(leaf, teacher[keep], temperature)
    (kl * scale[keep].double()).sum().backward()
    all_kl = torch.zeros(len(student), dtype=torch.float64)
    gradient = torch.zeros(student.shape, dtype=torch.float64)
    all_kl[keep], gradient[keep] = kl.detach(), leaf.grad
    return all_kl, gradient


def relative_error(value: Tensor, truth: Tensor) -> float:
    """L2 distance over L2 length of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def assert_token_kl(value: Tensor, truth: Tensor) -> None:
    """|dKL| <= 2e-6 + 1e-6 KL for every token."""
    excess = (value.double() - truth).abs() - (2e-6 + 1e-6 * truth.abs())
    assert excess.max() <= 0, f"worst token is {float(excess.max()):.2e} beyond the bound"


def logit_pair(
    tokens: int, vocabulary: int, noise: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [tokens, vocabulary] with KL about noise**2 / 2 per token."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(tokens, vocabulary, generator=generator) * 2
    student = teacher + noise * torch.randn(tokens, vocabulary, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def dense_cka(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Linear CKA as the paper has it, by the Gram matrices of the tokens; a weight counts a token so many times."""
    student, teacher = student[weights != 0], teacher[weights != 0]
    weights = weights[weights != 0]
    centre = torch.eye(len(weights), dtype=weights.dtype) - weights / weights.sum()
    root = weights.sqrt().diag()
    gram_s, gram_t = (root @ centre @ x @ x.t() @ centre.t() @ root for x in (student, teacher))
    return (gram_s * gram_t).sum() / (gram_s.square().sum() * gram_t.square().sum()).sqrt()
