"""``megaqad export``: the NVFP4 Hugging Face checkpoint of a student, in ``export/``."""

from megaqad import recovery
from megaqad.config import Settings
from megaqad.recovery.students import load_student


def export(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = recovery.Session.start(settings)
    recovery.export(session, load_student(session))
