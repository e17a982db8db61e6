"""From a Hugging Face tensor to a rank's Megatron parameter and back, on that rank alone.

The two halves of a family table's meaning: ``shard_range`` says which rows or columns of a tensor a rank holds,
``joined_views`` shows a Megatron parameter as views, one per part. Reading copies into the views; writing reads them.

Legend: d head size, g key/value groups on this rank, r query heads per group.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from megaqad.models.causal_lm import CausalLM, vocab_shard
from megaqad.models.description import ModelDescription
from megaqad.models.families import Join, Row, Shard
from megaqad.models.modules import QuantizerParameter
from megaqad.models.rows import PlacedRow, placed_rows


def shard_range(row: Row, size: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and one-past-last index that ``rank`` holds of the cut dim of ``size``, padding left out."""
    if row.shard is Shard.VOCAB:
        start, real, _ = vocab_shard(size, rank, ranks)
        return start, start + real
    assert size % ranks == 0, f"{row.megatron}: {size} does not divide by {ranks} ranks"
    return rank * (size // ranks), (rank + 1) * (size // ranks)


def joined_views(row: Row, parameter: Tensor, description: ModelDescription) -> list[Tensor]:
    """The parts of a Megatron parameter as views of it, in the order of ``row.parts``.

    A view's leading dims flatten to the rows of the Hugging Face shard: q is [g, r, d, ..], k and v are [g, 1, d, ..],
    gate and up are [rows, ..]. ``view.flatten(0, 2)`` (q, k, v) or the view itself is the shard.
    """
    if row.join is Join.QKV:
        per_group = description.num_heads // description.num_kv_heads
        heads = parameter.view(-1, per_group + 2, description.head_dim, *parameter.shape[1:])  # [g, r + 2, d, ..]
        return [heads[:, :per_group], heads[:, per_group : per_group + 1], heads[:, per_group + 1 :]]
    if row.join is Join.GATE_UP:
        return list(parameter.chunk(2))
    return [parameter]


def fill_parts(row: Row, parameter: Tensor, shards: list[Tensor], description: ModelDescription) -> None:
    """Write a rank's shards of the parts into its parameter; padded vocabulary rows become zero."""
    for view, shard in zip(joined_views(row, parameter, description), shards, strict=True):
        if row.shard is Shard.VOCAB:
            view[: shard.shape[0]].copy_(shard)
            view[shard.shape[0] :].zero_()
        else:
            view.copy_(shard.view(view.shape))


def take_parts(row: Row, parameter: Tensor, description: ModelDescription, rank: int, ranks: int) -> list[Tensor]:
    """The rank's shards of the parts, as the Hugging Face tensors have them, padding left out."""
    views = joined_views(row, parameter, description)
    if row.join is Join.QKV:
        return [view.flatten(0, 2) for view in views]
    if row.shard is Shard.VOCAB:
        start, stop = shard_range(row, description.vocab_size, rank, ranks)
        return [view[: stop - start] for view in views]
    return views


def local_parameters(chunk: CausalLM, description: ModelDescription) -> Iterator[tuple[PlacedRow, nn.Parameter]]:
    """The parameters that this chunk holds, learned scales apart, with their rows, in checkpoint order.

    Raises:
        AssertionError: the chunk has a parameter that no row of the table names.
    """
    local_index = {layer.layer_number - 1: index for index, layer in enumerate(chunk.decoder.layers)}
    parameters = {name: one for name, one in chunk.named_parameters() if not isinstance(one, QuantizerParameter)}
    for placed in placed_rows(description):
        if placed.layer is None:
            name = placed.row.megatron
        elif placed.layer in local_index:
            name = placed.row.megatron.format(layer=local_index[placed.layer])
        else:
            continue
        if name in parameters:
            yield placed, parameters.pop(name)
    assert not parameters, f"no row of family {description.family} names {sorted(parameters)}"
