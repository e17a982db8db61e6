"""``megaqad bench kl | nvfp4 | step``: this project beside its peers, one JSON object per measurement.

Beside the package in a checkout, inside it (``megaqad.benchmarks``) in a wheel; nothing in the package needs it.
"""
