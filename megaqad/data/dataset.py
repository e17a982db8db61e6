"""Token arrays to batches, without state: the same step gives the same samples in every layout, after any resume.

One array of tokens is cut into sequences of `sequence_length` tokens and the token after them, so neighbours share
one token and every token but the first is predicted exactly once per epoch. Which sequence is sample number `i` of a
run is a pure function of (seed, i): a counter-based hash orders the sequences of each epoch. There is nothing to save
but the number of samples consumed, and a run that resumes on twice the ranks continues with the samples it would have
seen.

    global batch      samples  0 .. global_batch_size-1  of a step
    micro batch m     micro_batch_size * data_size neighbours of them, rank r takes the r-th share

Letters: N tokens, b samples, s tokens of a sequence.
"""

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megaqad.data.batch import Batch
from megaqad.errors import UserError


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64-bit words that looks random.

    A few lines of integer arithmetic, so that the order of samples hangs on no library's random stream.
    """
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def mixed_counter(key: str, count: int) -> npt.NDArray[np.uint64]:
    """`count` random-looking words uint64 [count], a pure function of `key`; a longer call only adds words."""
    start = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    return mixed(mixed(start) ^ mixed(np.arange(count, dtype=np.uint64)))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `count` sequences: int64 [count], a permutation."""
    return np.argsort(mixed_counter(f"order {seed} {epoch}", count), kind="stable")


class TokenDataset:
    """Sequences cut from one array of tokens.

    tokens: int32 or int64 [N], in memory or memory-mapped. origin: what made the tokens (contents, split, tokenizer),
    part of the fingerprint. name: how messages call this data. Errors: `UserError` when N is too small for a sequence.
    """

    def __init__(
        self, tokens: Tensor, *, sequence_length: int, seed: int, origin: str = "", name: str = "training"
    ) -> None:
        assert tokens.ndim == 1, f"tokens must be one array, not of shape {tuple(tokens.shape)}"
        assert sequence_length >= 1, f"sequence_length={sequence_length}"
        if len(tokens) < 2:
            raise UserError(f"the {name} data has {len(tokens)} tokens, too few to predict one: give more text")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed = seed
        self.origin = origin
        self.name = name

    def __len__(self) -> int:
        """The number of full sequences; up to `sequence_length` tokens at the end belong to none."""
        return (len(self.tokens) - 1) // self.sequence_length

    def global_batch(self, step: int, *, global_batch_size: int) -> Batch:
        """All samples of a step (0 is the first): tensors [global_batch_size, s]."""
        return self._samples(np.arange(global_batch_size) + step * global_batch_size)

    def micro_batches(
        self, consumed_samples: int, *, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> list[Batch]:
        """This rank's part of the global batch that follows `consumed_samples` samples.

        Returns global_batch_size / (micro_batch_size * data_size) batches [micro_batch_size, s]. Over all `data_rank`s
        they are the same samples for every `data_size` and `micro_batch_size`. Errors: `UserError` when the global
        batch does not divide.
        """
        assert 0 <= data_rank < data_size, f"data_rank={data_rank} of {data_size}"
        together = micro_batch_size * data_size
        if global_batch_size % together:
            raise UserError(
                f"train.global_batch_size={global_batch_size} is no multiple of micro_batch_size x data-parallel ranks "
                f"= {micro_batch_size} x {data_size} = {together}: change one of them"
            )
        first = consumed_samples + data_rank * micro_batch_size
        starts = range(first, first + global_batch_size, together)
        return [self._samples(np.arange(start, start + micro_batch_size)) for start in starts]

    def evaluation_batches(
        self, micro_batch_size: int, data_rank: int, data_size: int, max_tokens: int = 0
    ) -> list[Batch]:
        """The tokens in their own order, for measuring: every token but the first is a label exactly once.

        max_tokens: count only so many labels (0: all). What fills up the last sequence, and the sequences that give
        every rank the same number of batches [micro_batch_size, s], has weight 0.
        """
        assert 0 <= data_rank < data_size, f"data_rank={data_rank} of {data_size}"
        labels = len(self.tokens) - 1
        labels = min(labels, max_tokens) if max_tokens else labels
        together = micro_batch_size * data_size
        sequences = -(-labels // self.sequence_length)
        offsets = np.arange(-(-sequences // together) * together) * self.sequence_length
        mine = offsets.reshape(-1, data_size, micro_batch_size)[:, data_rank]
        return [self._cut(starts, labels) for starts in mine]

    def fingerprint(self) -> str:
        """64 hex digits for everything that decides the batches: tokens, their origin, sequence length, seed."""
        digest = hashlib.sha256(f"{self.origin}\n{self.sequence_length} {self.seed} {len(self.tokens)}\n".encode())
        for part in self.tokens.split(1 << 24):
            digest.update(np.ascontiguousarray(part.numpy(), dtype="<i4").data)
        return digest.hexdigest()

    def _samples(self, samples: npt.NDArray[np.int64]) -> Batch:
        count = len(self)
        if count == 0:
            raise UserError(
                f"the {self.name} data has {len(self.tokens)} tokens, fewer than one sequence needs "
                f"({self.sequence_length} + 1): give more text or lower train.sequence_length"
            )
        sequences = [int(epoch_order(self.seed, int(i) // count, count)[int(i) % count]) for i in samples]
        return self._cut(np.asarray(sequences) * self.sequence_length, len(self.tokens) - 1)

    def _cut(self, starts: npt.NDArray[np.int64], labels: int) -> Batch:
        """The sequences that begin at `starts` [b]; a label counts when it is among the first `labels` of the data."""
        length = self.sequence_length
        windows = torch.zeros(len(starts), length + 1, dtype=torch.int64)  # [b, s + 1]
        for row, start in zip(windows, starts.tolist(), strict=True):
            part = self.tokens[start : start + length + 1]
            row[: len(part)] = part
        positions = torch.from_numpy(starts)[:, None] + torch.arange(length)  # [b, s]
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), (positions < labels).float())
