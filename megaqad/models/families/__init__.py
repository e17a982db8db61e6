"""Model families: config.json -> ``Architecture``, one file each; a file registers what it reads.

A new family is one new file here, or anywhere that is imported before ``describe_model`` is called.
"""

from megaqad.models.families.registry import describe_model, families, family

__all__ = ["describe_model", "families", "family"]
