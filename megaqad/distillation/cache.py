"""A teacher's last hidden states on disk: computed once, read by every later epoch, run and sweep.

    <directory>/teacher_cache.json        which teacher, tokenizer, data, sequence length and dtype
    <directory>/3f/3f09...safetensors     `hidden` [s, h] of one training sequence, whole, in the run's dtype

A sequence's file is named by the digest of its tokens. So the cache knows nothing of layouts, batch sizes, epochs or
order: any division of any run over the same data finds its sequences, and what is missing (the first epoch, or after an
interruption) is computed by the teacher and added. A file is written under another name and renamed: it is whole or
not there. A sequence of 4096 tokens of a model 4096 wide takes 32 MiB in BF16.

With the teacher's output head the hidden states give its exact logits again, so training from the cache is training
from the teacher bit for bit, in every layout of the same tensor-parallel and micro-batch size: pipeline stages,
interleaving, data parallelism and sequence parallelism may differ. A teacher divided by another tensor-parallel size
sums in another order and would itself differ in the last bits.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaqad.errors import UserError
from megaqad.losses.sharding import gather_sequence
from megaqad.runtime.agree import any_rank, on_main, together
from megaqad.runtime.files import write_safetensors, write_text_whole
from megaqad.runtime.ranks import Ranks

MANIFEST = "teacher_cache.json"
IN_WORDS = {
    "teacher": "another teacher (its weights differ)",
    "tokenizer": "another tokenizer (its files differ)",
    "data": "other data (the training tokens differ)",
}
"""Of manifest entries that are digests; of the others the values are shown."""


def tokens_digest(tokens: Tensor) -> str:
    """64 hex digits of the training tokens themselves, whatever order a run visits them in."""
    digest = hashlib.sha256()
    for part in tokens.split(1 << 24):
        digest.update(part.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


class HiddenCache:
    """One directory, open for one teacher and one set of data."""

    def __init__(self, directory: Path, facts: Mapping[str, str | int], ranks: Ranks) -> None:
        """
        Args:
            directory: made when it is not there.
            facts: what the hidden states depend on: digests of ``teacher``, ``tokenizer`` and ``data``, and
                ``sequence_length`` and ``dtype``.

        Collective: ``on_main``.

        Raises:
            UserError: the directory holds something else, or the cache of other facts; the first difference is named.
        """
        self._directory, self._ranks = directory, ranks
        on_main(lambda: _open(directory, facts))

    def has_all(self, tokens: Sequence[Tensor]) -> bool:
        """Whether no rank of the run misses a sequence of its microbatches [b, s]. Collective: one all-reduce."""
        mine = self._ranks.is_last_stage  # the others have nothing to read
        return not any_rank(mine and any(not path.is_file() for batch in tokens for path in self._paths(batch)))

    def read(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """[s(/tp), b, h] per microbatch, on the run's device; on the last stage. No collectives.

        Raises:
            UserError: a damaged file.
        """
        return [torch.stack([self._load(path) for path in self._paths(batch)], dim=1) for batch in tokens]

    def write(self, tokens: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        """Keep what is not there yet.

        Args:
            tokens: int64 [b, s] per microbatch, on every rank.
            hidden: as ``forward_hidden`` gave it: [s(/tp), b, h] on the last stage, empty elsewhere.

        Collectives: under sequence parallelism an all-gather per microbatch on the last stage; ``together``.

        Raises:
            UserError: the disk is full, or the directory cannot be written.
        """
        whole = [self._whole(states) for states in hidden]
        with together():
            if self._ranks.tensor_rank == 0:
                for batch, states in zip(tokens, whole, strict=False):  # no hidden states off the last stage
                    for sequence, path in enumerate(self._paths(batch)):
                        if not path.is_file():
                            self._save(path, states[:, sequence])

    def _whole(self, states: Tensor) -> Tensor:
        if not self._ranks.sizes.sequence:
            return states
        return gather_sequence(states.flatten(1), self._ranks.tensor_group).view(-1, *states.shape[1:])

    def _paths(self, batch: Tensor) -> list[Path]:
        rows = batch.to("cpu", torch.int32).contiguous().numpy()
        names = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
        return [self._directory / name[:2] / f"{name}.safetensors" for name in names]

    def _load(self, path: Path) -> Tensor:
        """[s(/tp), h]: under sequence parallelism this rank's slice."""
        ranks = self._ranks
        try:
            with safe_open(path, framework="pt") as file:
                part = file.get_slice("hidden")
                length = part.get_shape()[0] // (ranks.sizes.tensor if ranks.sizes.sequence else 1)
                first = ranks.tensor_rank * length if ranks.sizes.sequence else 0
                states: Tensor = part[first : first + length]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} of distill.cache is damaged ({error}): delete it, it is made again") from error
        return states.to(ranks.device)

    def _save(self, path: Path, states: Tensor) -> None:
        temporary = path.with_name(f".{path.name}.{dist.get_rank()}.{os.getpid()}.writing")
        try:
            path.parent.mkdir(exist_ok=True)
            write_safetensors(temporary, {"hidden": states}, {})
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"distill.cache={self._directory} cannot be written ({error.strerror}): make room or give another"
            ) from error


def _open(directory: Path, facts: Mapping[str, str | int]) -> None:
    """Create the cache, or compare it with what is wanted of it."""
    manifest = directory / MANIFEST
    try:
        if not manifest.is_file():
            if directory.is_dir() and any(directory.iterdir()):
                raise UserError(f"distill.cache={directory} is not empty and holds no {MANIFEST}: give a new directory")
            directory.mkdir(parents=True, exist_ok=True)
            write_text_whole(manifest, json.dumps(facts, indent=2) + "\n")
            return
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"distill.cache={directory} cannot be used ({error.strerror}): give another directory"
        ) from error
    except json.JSONDecodeError:
        raise UserError(f"{manifest} is damaged: give another distill.cache") from None
    for key, value in facts.items():
        if found.get(key) != value:
            said = IN_WORDS.get(key, f"{key}={found.get(key)}, this run has {value}")
            raise UserError(f"distill.cache={directory} was made for {said}: give another directory")
