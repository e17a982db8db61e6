"""``megaqad distill``: train the quantized student; goes on by itself from the newest checkpoint."""

from megaqad.commands.session import Session
from megaqad.commands.students import train_student
from megaqad.config import Settings
from megaqad.distillation.step import Objective


def distill(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings, command="distill")
    train_student(session, settings.run_dir, Objective(settings.distill.objective))
