"""Peak memory of a process, from inside it; also ``python -m tests.resident <arguments of megaqad>``."""

import sys
from pathlib import Path


def peak_resident() -> int:
    """Bytes. Not getrusage's, which begin at the peak of the parent process. Pages of mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    from megaqad.cli import main

    code = main()
    print(f"peak_resident {peak_resident()}")
    sys.exit(code)
