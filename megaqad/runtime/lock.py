"""One run at a time in one directory: a ``FileLock`` on a file in it, which also says who holds it.

The kernel drops the lock when the process that holds it ends, however it ends, so a crashed run leaves nothing to clean
up; what the file says about its holder is only for the message. A run that was just killed may take a moment to be
gone: the lock is waited for that long. File locks that live on in a file where the kernel has none would keep a crashed
run's directory shut, so there nothing is locked.
"""

import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

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
        path = directory / FILE
        note = f"`megaqad {holder}` (process {os.getpid()} on {socket.gethostname()})"

        def sign(descriptor: int) -> None:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, note.encode(), 0)

        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=sign)
        try:
            self._lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            other = path.read_text(encoding="utf-8") or "another run"
            raise UserError(
                f"output_dir={directory} is in use by {other}: wait until that run has ended or give another"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self.supported = False

    def release(self) -> None:
        """Let the next one in. Releasing twice does no harm."""
        self._lock.release()
