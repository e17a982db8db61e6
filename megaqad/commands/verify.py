"""``megaqad verify``: read the export back as a client would and compare it with the student, in ``verify.json``."""

from megaqad import recovery
from megaqad.config import Settings
from megaqad.recovery.students import load_student


def verify(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = recovery.Session.start(settings)
    recovery.verify(session, load_student(session))
