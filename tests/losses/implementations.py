"""The implementations that can run here."""

IMPLEMENTATIONS = ["reference", "torch"]
FAST_IMPLEMENTATIONS = [name for name in IMPLEMENTATIONS if name != "reference"]
