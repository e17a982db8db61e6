"""Which layers are on which pipeline stage. Any number of layers goes on any number of stages.

Consecutive runs of layers of equal length, as far as they divide. The layers that remain go one each to chunks in the
middle, since the first also has the embedding and the last the head. Interleaved: chunk number ``v * stages + p`` of
the model is virtual stage ``v`` of pipeline rank ``p``.
"""

from megaqad.runtime.sizes import ParallelSizes


def chunk_lengths(layers: int, chunks: int) -> list[int]:
    """How many layers each chunk of the model has, in model order."""
    each, more = divmod(layers, chunks)
    middle_out = sorted(range(chunks), key=lambda chunk: abs(2 * chunk + 1 - chunks))
    longer = set(middle_out[:more])
    return [each + (chunk in longer) for chunk in range(chunks)]


def chunk_layers(layers: int, sizes: ParallelSizes, pipeline_rank: int, virtual_stage: int) -> range:
    """Indices of the layers in one chunk."""
    lengths = chunk_lengths(layers, sizes.pipeline * sizes.virtual_pipeline)
    chunk = virtual_stage * sizes.pipeline + pipeline_rank
    first = sum(lengths[:chunk])
    return range(first, first + lengths[chunk])


def stage_of_layer(layers: int, sizes: ParallelSizes) -> list[int]:
    """Pipeline rank by layer index."""
    stages = [0] * layers
    for rank in range(sizes.pipeline):
        for virtual_stage in range(sizes.virtual_pipeline):
            for layer in chunk_layers(layers, sizes, rank, virtual_stage):
                stages[layer] = rank
    return stages
