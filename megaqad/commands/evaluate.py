"""``megaqad evaluate``: held-out numbers of a student, in ``evaluation.json``."""

from megaqad import recovery
from megaqad.config import Settings
from megaqad.recovery.students import load_student


def evaluate(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = recovery.Session.start(settings)
    session.terminal.say(recovery.evaluate(session, load_student(session)).summary)
