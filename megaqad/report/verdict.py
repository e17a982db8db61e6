"""The answer to "did it work?" in words, made from the numbers alone.

The measure is the share of the PTQ gap that came back: of the KL to the teacher that quantization added, the part that
distillation removed again, (KL_ptq - KL_qad) / (KL_ptq - KL_bf16). 100 % is the teacher itself; below 0 the student is
worse than plain post-training quantization.
"""

from dataclasses import dataclass
from typing import Literal

from megaqad.report.results import Column, RunResults

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
SMALLEST_GAP = 1e-7
"""KL below this is rounding of FP32 logits, not a loss that could be recovered."""

LABEL = {"bf16": "BF16", "ptq": "PTQ", "qat": "QAT", "qad": "QAD"}
"""How each column is called."""

Tone = Literal["good", "neutral", "bad"]


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. sentences: what supports it. tone: how the page sets it. share: None without a gap."""

    headline: str
    sentences: tuple[str, ...]
    tone: Tone
    share: float | None


def recovered_share(column: Column, results: RunResults) -> float | None:
    """Share of the PTQ gap that `column` has back; None when quantization left no gap to measure."""
    gap = results.ptq.kl_to_teacher - results.bf16.kl_to_teacher
    return (results.ptq.kl_to_teacher - column.kl_to_teacher) / gap if gap > SMALLEST_GAP else None


def judge(results: RunResults) -> Verdict:
    """Put the results into words."""
    share = recovered_share(results.qad, results)
    sentences = [_kl_sentence(results)]
    tone: Tone
    if share is None:
        headline, tone = "Quantization lost nothing that could be recovered.", "neutral"
    elif share > 0:
        headline, tone = f"Distillation recovered {percent(share)} of what quantization lost.", "good"
    else:
        headline, tone = "Distillation did not help: the quantized model was closer to its teacher before.", "bad"
    sentences.append(_text_sentence(results))
    if results.qat is not None:
        sentences.append(_qat_sentence(results.qat, results))
    verification = results.facts.verification
    if verification is not None and not verification.passed:
        headline, tone = "The exported checkpoint does not match the student: do not ship it.", "bad"
    return Verdict(headline, tuple(sentences), tone, share)


def _kl_sentence(results: RunResults) -> str:
    ptq, qad = results.ptq, results.qad
    way = "fell" if qad.kl_to_teacher < ptq.kl_to_teacher else "went"
    return (
        f"The held-out KL divergence from the BF16 teacher {way} from {nats(ptq.kl_to_teacher)} after quantization "
        f"(PTQ) to {nats(qad.kl_to_teacher)} after distillation (QAD)."
    )


def _text_sentence(results: RunResults) -> str:
    bf16, ptq, qad = results.bf16, results.ptq, results.qad
    return (
        f"The distilled model picks the teacher's most likely token at {percent(qad.top1_agreement)} of positions (PTQ "
        f"{percent(ptq.top1_agreement)}); its cross entropy is {entropy(qad.cross_entropy)} (PTQ "
        f"{entropy(ptq.cross_entropy)}, teacher {entropy(bf16.cross_entropy)})."
    )


def _qat_sentence(qat: Column, results: RunResults) -> str:
    better = qat.kl_to_teacher < results.ptq.kl_to_teacher
    drift = "also came closer to the teacher" if better else "drifted away from the teacher"
    ratio = qat.kl_to_teacher / results.qad.kl_to_teacher if results.qad.kl_to_teacher > 0 else float("inf")
    times = f", {ratio:.1f} times QAD's" if 1.05 < ratio < 1e6 else ""
    return (
        f"Fine-tuning on the text with cross entropy (QAT) {drift}: KL {nats(qat.kl_to_teacher)}{times}, "
        f"at a cross entropy of {entropy(qat.cross_entropy)}."
    )


def recovered_text(name: str, column: Column, results: RunResults) -> str:
    """The table's entry for the share of the gap that a trained model has back; a dash where there is none."""
    share = recovered_share(column, results) if name in ("qat", "qad") else None
    return "\N{EN DASH}" if share is None else percent(share)


def percent(share: float) -> str:
    """A share as a percentage with one decimal; 100.0 % and 0.0 % are kept for exactly all and nothing."""
    rounded = round(100 * share, 1)
    if rounded in (0.0, 100.0) and rounded != 100 * share:
        rounded += 0.1 if 100 * share > rounded else -0.1
    return f"{rounded:.1f}".replace("-", MINUS) + f"{NBSP}%"


def nats(value: float) -> str:
    """A KL with four significant digits; below 1e-7 it is 0."""
    if abs(value) < SMALLEST_GAP:
        return "0"
    return f"{value:#.4g}".rstrip(".") if abs(value) >= 1e-4 else f"{value:.2e}"


def entropy(value: float) -> str:
    """A cross entropy with four decimals."""
    return f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 2 min 41 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02}{NBSP}min"
