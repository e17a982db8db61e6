"""How a model and its batches are divided, as plain numbers; no torch, so that settings can be checked without it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Sizes of the parallel axes. The data-parallel size is what remains of the world.

    A user's settings under ``parallel.`` are these, so a field's meaning stands below it.
    """

    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Stages of consecutive layers."""
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank; more than 1 interleaves them (smaller bubble, more sends)."""
    context: int = 1
    """Ranks that share each sequence. Needs Transformer Engine's attention; 1 elsewhere."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer: neighbouring replicas, which exchange tokens."""
    sequence: bool = False
    """Divide the activations between the tensor-parallel regions along the sequence as well."""

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model occupies."""
        return self.tensor * self.pipeline * self.context
