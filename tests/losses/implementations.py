"""The implementations that can run here."""

from megaqad.losses import native

IMPLEMENTATIONS = ["reference", "torch"]
if native.unavailable() is None:
    IMPLEMENTATIONS.append("native")
FAST_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name != "reference"]
