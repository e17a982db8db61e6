"""``megaqad distill``: train the quantized student; resumes by itself from the newest checkpoint."""

from megaqad import recovery
from megaqad.config import Settings


def distill(settings: Settings) -> None:
    """Every rank's part of the command."""
    recovery.distill(recovery.Session.start(settings, command="distill"))
