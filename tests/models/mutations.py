"""Damaged checkpoint directories: bytes and values changed at random. Read as they stand, with the logits that
transformers computes where it is the config.json that was changed, or refused in one line.

``python -m tests.models.mutations 10000`` tries as many and says how often each outcome was seen.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from megaqad.errors import UserError
from megaqad.models.checkpoint_files import INDEX_FILE, SINGLE_FILE
from megaqad.models.checks import check_checkpoint, check_layout
from megaqad.models.families import describe_model
from megaqad.models.load import SliceReader
from megaqad.runtime.ranks import ParallelSizes
from tests.models.checkpoints import make_checkpoint
from tests.models.megatron_runs import local_logits, whole_logits
from tests.ranks import run_ranks

STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    1e300,
    float("nan"),
    "",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [1, "a"],
    10**30,
)
HEADER_BYTES = 4096


def flip(content: bytes, rng: random.Random, among: int | None = None) -> bytes:
    """A few bytes changed, put in or left out."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(min(len(changed), among or len(changed)))
        kind = rng.randrange(3)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place]
        else:
            changed.insert(place, rng.randrange(256))
    return bytes(changed)


def of_config(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    key = rng.choice(list(content))
    if rng.random() < 0.3:
        del content[key]
    else:
        content[key] = rng.choice(STRANGE)
    path.write_text(json.dumps(content))


def of_index(folder: Path, rng: random.Random) -> None:
    path = folder / INDEX_FILE
    content = json.loads(path.read_text())
    names = content["weight_map"]
    name = rng.choice(list(names))
    kind = rng.randrange(4)
    if kind == 0:
        del names[name]
    elif kind == 1:
        names[name] = rng.choice([*set(names.values()), "../x.safetensors", "absent.safetensors", *STRANGE])
    elif kind == 2:
        names[rng.choice(["phantom", "model.layers.7.x.weight"])] = names[name]
    else:
        content["weight_map"] = rng.choice(STRANGE)
    path.write_text(json.dumps(content))


def of_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.write_bytes(flip(path.read_bytes(), rng, among=HEADER_BYTES))


def of_length(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + b"\0" * 8)


def of_files(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.5:
        path.unlink()
    else:
        path.rename(folder / rng.choice([SINGLE_FILE, INDEX_FILE, "config.json", "other.safetensors"]))


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    of_config,
    of_index,
    of_bytes,
    of_bytes,
    of_length,
    of_files,
)


def original(folder: Path) -> dict[str, bytes]:
    """A checkpoint of two files with an index, by file name."""
    make_checkpoint("qwen3", folder, num_hidden_layers=1)
    tensors = load_file(folder / SINGLE_FILE)
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: file for file, mine in halves.items() for name in mine}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    keep = ("config.json", INDEX_FILE, *halves)
    return {name: (folder / name).read_bytes() for name in keep}


def outcome(folder: Path) -> str:
    """What becomes of a directory; asserts that it is refused in one line, or that every value is the file's own."""
    refusal = ""
    try:
        architecture = describe_model(folder)
        check_layout(architecture, ParallelSizes())
        check_checkpoint(architecture, folder)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        return "refused"
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    with SliceReader(folder, 0, 1) as reader:
        for weight in architecture.stored_weights:
            for part in weight.parts:
                torch.testing.assert_close(reader.read(part), stored[part.name], rtol=0, atol=0, equal_nan=True)
    return "read"


def logits_or_refusal(rank: int, world: int, folder: Path, tokens: np.ndarray) -> Any:
    try:
        return local_logits(rank, world, folder, ParallelSizes(), tokens)
    except UserError as error:  # a number that is none
        return str(error)


def logits_of(folder: Path) -> str:
    """Of a directory whose config.json was changed and whose headers fit; asserts that they are transformers'."""
    tokens = np.random.default_rng(0).integers(0, 257, (2, 16))
    results = run_ranks(1, logits_or_refusal, folder, tokens)
    if isinstance(results[0], str):
        assert "\n" not in results[0]
        return "refused"
    found = whole_logits(results)
    # by its class: a file may do without the model_type that transformers finds it by
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), use_cache=False).logits
    if not expected.isfinite().all():
        return "read, not finite"
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    return "read, logits right"


def check(count: int, seed: int = 0) -> Counter[str]:
    """How often each outcome was seen in so many damaged directories."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        files = original(base / "original")
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            folder = base / "damaged"
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(content)
            for _ in range(rng.choice((1, 1, 2))):
                if any(folder.iterdir()):
                    try:
                        rng.choice(MUTATIONS)(folder, rng)
                    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError):
                        continue  # what the first mutation left is no file for the second
            try:
                found = outcome(folder)
                if found == "read" and (folder / "config.json").read_bytes() != files["config.json"]:
                    found = logits_of(folder)
                seen[found] += 1
            except BaseException:
                print(f"number {number} of seed {seed}", file=sys.stderr)
                raise
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    return seen


if __name__ == "__main__":
    print(dict(check(int(sys.argv[1]), *map(int, sys.argv[2:]))))
