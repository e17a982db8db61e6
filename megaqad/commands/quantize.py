"""``megaqad quantize``: calibrate, keep the quantized student in ``ptq/``, measure what it lost."""

from megaqad.config import Settings
from megaqad.recovery import quantize as quantized
from megaqad.recovery.session import Session
from megaqad.recovery.stages import measure_gap


def quantize(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings, command="quantize")
    gap = measure_gap(session, quantized(session), session.evaluator(settings.evaluation.max_tokens))
    session.terminal.say(f"PTQ: {gap.summary}")
