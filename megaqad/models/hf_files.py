"""A Hugging Face checkpoint directory, written by one rank and visible only when complete.

The files are written to a directory beside the final one and renamed into place at the end: a run that dies half way
leaves the target as it was. All ranks call the same methods; only the main rank touches the disk.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megaqad.errors import UserError
from megaqad.models.checkpoint_files import INDEX_FILE, SINGLE_FILE
from megaqad.runtime.files import write_safetensors
from megaqad.runtime.parallel import ParallelContext

MAX_FILE_BYTES = 5_000_000_000
"""Weights per file; also the most that the writer holds in memory."""

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What a checkpoint has beside weights and config.json and a client needs."""


class HfFiles:
    """Writer of one checkpoint directory."""

    def __init__(self, output_dir: Path, context: ParallelContext) -> None:
        """
        Args:
            output_dir: final place; must not exist, or be an empty directory.
            context: this rank's place; the main rank writes.
        """
        self.output_dir = Path(output_dir).absolute()
        self.context = context

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A directory to write to (on the main rank), put in its place when the block ends without an error.

        Collective: the main rank's verdict on ``output_dir`` is broadcast to all, and all wait for the rename.

        Raises:
            UserError: ``output_dir`` holds something; on every rank.
        """
        self._refuse_occupied()
        folder = self.output_dir.with_name(f".{self.output_dir.name}.incomplete")
        if self.context.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            yield folder
            if self.context.is_main:
                if self.output_dir.exists():
                    self.output_dir.rmdir()
                os.replace(folder, self.output_dir)
        finally:
            if self.context.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()

    def _refuse_occupied(self) -> None:
        occupied = False
        if self.context.is_main:
            occupied = self.output_dir.exists() and (not self.output_dir.is_dir() or any(self.output_dir.iterdir()))
        verdict = [occupied]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0]:
            raise UserError(f"{self.output_dir} already holds files; choose another directory or remove it")

    def write_tensors(
        self,
        folder: Path,
        sizes: Sequence[tuple[str, int]],
        tensors: Iterable[tuple[str, Tensor]],
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Write a stream of tensors to as few files as ``max_file_bytes`` allows, with an index when several.

        Args:
            folder: from ``writing``.
            sizes: (name, bytes) of every tensor in the order of the stream, known beforehand so that the number of
                files, which is part of their names, is too.
            tensors: the stream; run to its end on every rank.
        """
        plan = _plan_files(sizes, max_file_bytes)
        stream = iter(tensors)
        if not self.context.is_main:
            assert next(stream, None) is None, "only the main rank receives tensors"
            return
        for file, names in plan.items():
            held: dict[str, Tensor] = {}
            for expected in names:
                name, tensor = next(stream)
                assert name == expected, f"{name} came where {expected} was planned"
                held[name] = tensor.contiguous()
            write_safetensors(folder / file, held, {"format": "pt"})
        assert next(stream, None) is None, "the stream holds more tensors than planned"
        if len(plan) > 1:
            weight_map = {name: file for file, names in plan.items() for name in names}
            total = {"total_size": sum(size for _, size in sizes)}
            self.write_json(folder, INDEX_FILE, {"metadata": total, "weight_map": weight_map})

    def write_json(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file, on the main rank."""
        if self.context.is_main:
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy_side_files(self, folder: Path, model_dir: Path) -> None:
        """Copy tokenizer, generation settings and licence from the original checkpoint, on the main rank."""
        if self.context.is_main:
            for pattern in SIDE_FILES:
                for path in sorted(Path(model_dir).glob(pattern)):
                    if path.is_file():
                        shutil.copyfile(path, folder / path.name)


def _plan_files(sizes: Sequence[tuple[str, int]], max_file_bytes: int) -> dict[str, list[str]]:
    """Tensor names by file name: consecutive runs of at most ``max_file_bytes``, one tensor at least."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if runs[-1] and filled + size > max_file_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    if len(runs) == 1:
        return {SINGLE_FILE: runs[0]}
    return {f"model-{number:05d}-of-{len(runs):05d}.safetensors": run for number, run in enumerate(runs, 1)}
