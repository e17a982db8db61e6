"""``megaqad quantize``: calibrate, keep the quantized student in ``ptq/``, measure what it lost."""

from megaqad import recovery
from megaqad.config import Settings
from megaqad.recovery.stages import measure_gap


def quantize(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = recovery.Session.start(settings, command="quantize")
    gap = measure_gap(session, recovery.quantize(session), session.evaluator(settings.evaluation.max_tokens))
    session.terminal.say(f"PTQ: {gap.summary}")
