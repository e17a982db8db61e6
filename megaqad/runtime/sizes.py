"""How a model and its batches are divided, as plain numbers; no torch, so that settings can be checked without it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Sizes of the parallel axes. The data-parallel size is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model occupies."""
        return self.tensor * self.pipeline * self.context
