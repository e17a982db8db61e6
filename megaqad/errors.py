"""The two kinds of failure: what the user can fix, and what only we can.

A ``UserError`` carries one line that names the value, the limit and the way out. The command line prints that line
alone and exits with code 2. Anything else that escapes is a defect and keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_STOPPED_EARLY = 3


class UserError(ValueError):
    """A mistake in what the user asked for or supplied; its message is one complete line."""


class StoppedEarly(Exception):
    """The run ended before its last step, on a signal or a time limit, with everything saved."""
