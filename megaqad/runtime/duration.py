"""Lengths of time as people write them: ``3h50m``, ``90s``, ``20m``."""

import re

from megaqad.errors import UserError

_FORM = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def seconds_of(text: str, setting: str) -> float:
    """Seconds; a plain number is seconds already.

    Args:
        setting: named in the message.

    Raises:
        UserError: not a length of time above 0.
    """
    match = _FORM.fullmatch(text.strip())
    if match is not None:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        total = hours * 3600 + minutes * 60 + seconds
        if total > 0:
            return total
    raise UserError(f"{setting}={text} is no length of time: write it like 3h50m, 20m or 90s")
