"""One run at a time in one directory.

An advisory lock of the operating system (``flock``) on a file in the directory. The kernel drops it when the process
that holds it ends, however it ends, so a crashed run leaves nothing to clean up; what the file says about its holder is
only for the message. A run that was just killed may take a moment to be gone: the lock is waited for that long.
"""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from megaqad.errors import UserError

FILE = ".lock"
PATIENCE_SECONDS = 5.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class DirectoryLock:
    """Held from construction until ``release`` or the end of the process."""

    def __init__(self, directory: Path, holder: str) -> None:
        """
        Args:
            directory: must exist.
            holder: what the next one is told.

        Raises:
            UserError: another process holds it, and which one.
            OSError: the file cannot be created.
        """
        self.supported = True
        """False where the file system knows no locks: nothing is locked then."""
        self._file = (directory / FILE).open("a+", encoding="utf-8")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._try():
            if time.monotonic() > deadline:
                other = self._holder()
                self._file.close()
                raise UserError(
                    f"output_dir={directory} is in use by {other}: wait until that run has ended or give another"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(json.dumps({"holder": holder, "pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self.supported = False
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            content = json.loads(self._file.read())
            return f"`megaqad {content['holder']}` (process {content['pid']} on {content['host']})"
        except (ValueError, KeyError, TypeError):
            return "another run"

    def release(self) -> None:
        """Let the next one in. Releasing twice does no harm."""
        self._file.close()
