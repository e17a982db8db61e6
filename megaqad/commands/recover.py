"""``megaqad recover``: the whole journey in one run, then the report."""

import sys

from megaqad import recovery
from megaqad.commands.report import show_report
from megaqad.config import Settings


def recover(settings: Settings) -> None:
    """Every rank's part of the command."""
    run_recovery(settings, command="recover")


def run_recovery(settings: Settings, *, command: str) -> None:
    """The journey; ``command`` is the name the user called it by."""
    session = recovery.Session.start(settings, command=command)
    recovery.recover(session, command=["megaqad", *sys.argv[1:]])
    if session.ranks.is_main:
        show_report(settings)
