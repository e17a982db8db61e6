"""``python -m megaqad`` and ``torchrun -m megaqad``."""

import sys

from megaqad.cli import main

if __name__ == "__main__":
    sys.exit(main())
