"""``megaqad demo``: ``recover`` on the bundled teacher with the settings of ``conf/experiment/demo.yaml``."""

from megaqad.commands.recover import run_recovery
from megaqad.config import Settings


def demo(settings: Settings) -> None:
    """Every rank's part of the command."""
    run_recovery(settings, command="demo")
