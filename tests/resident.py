"""A command of megaqad and its peak memory: ``python -m tests.resident <arguments of megaqad>``."""

import sys

from benchmarks.measure import resident

if __name__ == "__main__":
    from megaqad.cli import main

    code = main()
    print(f"peak_resident {resident('VmHWM')}")
    sys.exit(code)
