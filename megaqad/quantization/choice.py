"""What ``quantization.auto`` chose, in ``auto.json``: made once per run, and the run's recipe from then on.

Whatever comes later (training, resuming, export, verification) reads this file and measures nothing again, so that all
of them quantize the same layers whatever the layout they run in.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.quantization.allocation import GroupKL
from megaqad.runtime.files import write_text_whole

FILE = "auto.json"


@dataclass(frozen=True)
class Choice:
    """Which groups stay BF16, and what that was expected to cost and does."""

    target_bits: float
    average_bits: float
    """Bits per weight over the groups, at most the target."""
    kept: tuple[str, ...]
    """Groups in BF16."""
    kept_modules: tuple[str, ...]
    """Their Hugging Face modules; in addition to ``quantization.exclude``."""
    predicted_kl: float
    """Sum of the quantized groups' KLs, each measured alone."""
    measured_kl: float
    """KL of the choice itself, on the same tokens."""
    tokens: int
    """Held-out tokens of each measurement."""
    groups: tuple[GroupKL, ...]


def write_choice(run_dir: Path, choice: Choice) -> None:
    """Record the choice of the run in ``run_dir``, whole or not at all."""
    write_text_whole(run_dir / FILE, json.dumps(asdict(choice), indent=2) + "\n")


def has_choice(run_dir: Path) -> bool:
    """Whether the run has chosen already."""
    return (run_dir / FILE).is_file()


def read_choice(run_dir: Path) -> Choice:
    """The choice of the run in ``run_dir``.

    Raises:
        UserError: it has not chosen, or the file is damaged.
    """
    path = run_dir / FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: tuple(found[name]) for name in ("kept", "kept_modules")}
        found["groups"] = tuple(GroupKL(**group) for group in found["groups"])
        return Choice(**found)
    except FileNotFoundError:
        raise UserError(
            f"quantization.auto has chosen nothing in {run_dir} yet: run `megaqad quantize` there first"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged: give another output_dir, or remove it to choose again") from None
