"""A Hugging Face checkpoint directory, written by one rank and visible only when complete.

The files are written to a directory beside the final one and renamed into place at the end: a run that dies half way
leaves the target as it was. All ranks call the same methods; only the main rank touches the disk.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megaqad.errors import UserError
from megaqad.models.checkpoint_files import INDEX_FILE, OTHER_WEIGHTS, SINGLE_FILE
from megaqad.runtime.agree import on_main
from megaqad.runtime.files import (
    Description,
    sync_directory,
    write_bytes_whole,
    write_safetensors_as_they_come,
    write_text_whole,
)
from megaqad.runtime.ranks import Ranks

MAX_FILE_BYTES = 5_000_000_000
"""Weights per file."""

WEIGHTS = (".safetensors", *OTHER_WEIGHTS, ".incomplete")
"""Endings of files that hold weights."""
DESCRIBES_WEIGHTS = ("config.json", "hf_quant_config.json")
SIDE_FOLDERS = ("additional_chat_templates",)


class HfFiles:
    """Writer of one checkpoint directory."""

    def __init__(self, output_dir: Path, ranks: Ranks, *, manifest: str | None = None) -> None:
        """
        Args:
            output_dir: final place; must not exist, or be an empty directory.
            ranks: this rank's place; the main rank writes.
            manifest: name of a file that lists what was written; a directory that has it is replaced, unless it also
                holds what the manifest does not name.
        """
        self.output_dir = Path(output_dir).absolute()
        self.ranks, self.manifest = ranks, manifest

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A directory to write to (on the main rank), put in its place when the block ends without an error.

        What is replaced stays until then. Collective: the main rank's verdict on ``output_dir`` is broadcast to all,
        and all wait for the rename.

        Raises:
            UserError: ``output_dir`` holds something that it must not lose, or cannot be written; on every rank.
        """
        on_main(lambda: refuse_occupied(self.output_dir, self.manifest))
        folder = self.output_dir.with_name(f".{self.output_dir.name}.incomplete")
        if self.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            yield folder
            if self.ranks.is_main:
                self._put_in_place(folder)
        finally:
            if self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()

    def _put_in_place(self, folder: Path) -> None:
        """Flushed to the disk, then renamed; an earlier one is moved aside first and removed last."""
        sync_directory(folder)
        earlier = self.output_dir.with_name(f".{self.output_dir.name}.earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if self.output_dir.exists():
            self.output_dir.rename(earlier)
        folder.rename(self.output_dir)
        sync_directory(self.output_dir.parent)
        shutil.rmtree(earlier, ignore_errors=True)

    def write_tensors(
        self,
        folder: Path,
        described: Sequence[Description],
        tensors: Iterable[tuple[str, Tensor]],
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """Write a stream of tensors to as few files as ``max_file_bytes`` allows, with an index when several.

        Args:
            folder: from ``writing``.
            described: every tensor in the order of the stream, known beforehand so that the number of files, which is
                part of their names, is too.
            tensors: the stream; run to its end on every rank.
        """
        plan = _plan_files(described, max_file_bytes)
        stream = iter(tensors)
        if not self.ranks.is_main:
            assert next(stream, None) is None, "only the main rank receives tensors"
            return
        for file, held in plan.items():
            write_safetensors_as_they_come(folder / file, islice(stream, len(held)), held, {"format": "pt"})
        assert next(stream, None) is None, "the stream holds more tensors than planned"
        if len(plan) > 1:
            weight_map = {one.name: file for file, held in plan.items() for one in held}
            total = {"total_size": sum(one.nbytes for one in described)}
            self.write_json(folder, INDEX_FILE, {"metadata": total, "weight_map": weight_map})

    def write_json(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file, on the main rank."""
        if self.ranks.is_main:
            write_text_whole(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def copy_side_files(self, folder: Path, model_dir: Path) -> None:
        """Copy what the original checkpoint has beside weights and their description, on the main rank: tokenizer,
        templates, generation settings, licences, code of its own."""
        if not self.ranks.is_main:
            return
        for path in sorted(Path(model_dir).iterdir()):
            if path.is_file() and is_side_file(path):
                write_bytes_whole(folder / path.name, path.read_bytes())
            elif path.is_dir() and path.name in SIDE_FOLDERS:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def refuse_occupied(output_dir: Path, manifest: str | None) -> None:
    """Whether a checkpoint may be put in the place of ``output_dir``. ``manifest``: as of ``HfFiles``.

    Raises:
        UserError: it holds something that was not written here.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file; choose another directory or remove it")
    foreign = {path.name for path in output_dir.iterdir()} - _written_before(output_dir, manifest)
    if foreign:
        raise UserError(
            f"{output_dir} already holds {sorted(foreign)[0]}, which is not replaced; move it, or choose another "
            "directory"
        )


def _written_before(output_dir: Path, manifest: str | None) -> set[str]:
    if manifest is None:
        return set()
    try:
        content = json.loads((output_dir / manifest).read_text(encoding="utf-8"))
        return {manifest, *content["files"], *content["weights"]}
    except (ValueError, TypeError, KeyError, OSError):
        return set()


def is_side_file(path: Path) -> bool:
    """Whether a file of a checkpoint is none of weights, index or config.json."""
    name = path.name
    described = name in DESCRIBES_WEIGHTS or name.endswith(".index.json")
    return not described and not name.startswith((".", "megaqad_")) and not name.endswith(WEIGHTS)


def _plan_files(described: Sequence[Description], max_file_bytes: int) -> dict[str, list[Description]]:
    """Tensors by file name: consecutive runs of at most ``max_file_bytes``, one tensor at least."""
    runs: list[list[Description]] = [[]]
    filled = 0
    for one in described:
        if runs[-1] and filled + one.nbytes > max_file_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(one)
        filled += one.nbytes
    if len(runs) == 1:
        return {SINGLE_FILE: runs[0]}
    return {f"model-{number:05d}-of-{len(runs):05d}.safetensors": run for number, run in enumerate(runs, 1)}
