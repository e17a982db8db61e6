"""The settings of a command: typed, composed from ``conf/`` and the command line, checked before a rank is started.

``settings.py`` holds every setting with its meaning, ``load.py`` composes them with Hydra, ``checks.py`` refuses what
cannot work, ``help.py`` prints them.
"""

from megaqad.config.checks import check_data, check_settings
from megaqad.config.help import settings_help
from megaqad.config.load import check_form, load_settings
from megaqad.config.settings import CheckpointSettings, Settings, TrainSettings

__all__ = [
    "CheckpointSettings",
    "Settings",
    "TrainSettings",
    "check_data",
    "check_form",
    "check_settings",
    "load_settings",
    "settings_help",
]
