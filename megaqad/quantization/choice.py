"""What ``quantization.auto`` chose, in ``auto.json``: made once per run, and the run's recipe from then on.

Whatever comes later (training, resuming, export, verification) reads this file and measures nothing again, so that all
of them quantize the same layers whatever the layout they run in.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megaqad.errors import UserError
from megaqad.quantization.allocation import GroupKL
from megaqad.quantization.recipe_file import recipe_text
from megaqad.quantization.settings import QuantizationSettings
from megaqad.runtime.files import write_text_whole

FILE, RECIPE_FILE = "auto.json", "auto.yaml"


@dataclass(frozen=True)
class Choice:
    """What each group became, and what that was expected to cost and does."""

    target_bits: float
    average_bits: float
    """Bits per weight over the groups, at most the target."""
    chosen: dict[str, str]
    """``fp8`` or ``bf16`` by group, of those that the recipe's NVFP4 is not for."""
    formats: dict[str, str]
    """The same by Hugging Face module: ``quantization.formats`` of the recipe that was chosen."""
    predicted_kl: float
    """Sum of the groups' KLs, each measured alone."""
    measured_kl: float
    """KL of the choice itself, on the same tokens."""
    tokens: int
    """Held-out tokens of each measurement."""
    groups: tuple[GroupKL, ...]

    def of(self, chosen: str) -> list[str]:
        """Groups that became ``chosen``."""
        return [group for group, name in self.chosen.items() if name == chosen]


def chosen_settings(settings: QuantizationSettings, choice: Choice) -> QuantizationSettings:
    """The recipe that was chosen, as one that chooses nothing any more."""
    return replace(settings, auto=None, formats=choice.formats)


def write_choice(run_dir: Path, choice: Choice, settings: QuantizationSettings) -> None:
    """Record the choice of the run in ``run_dir``, and beside it the recipe: ``quantization=<run_dir>/auto.yaml``
    quantizes alike in other runs, without measuring. ``settings``: those that it was chosen under."""
    write_text_whole(run_dir / RECIPE_FILE, recipe_text(chosen_settings(settings, choice), _title(choice)))
    write_text_whole(run_dir / FILE, json.dumps(asdict(choice), indent=2) + "\n")


def _title(choice: Choice) -> str:
    return (
        f"Chosen by quantization.auto=bits:{choice.target_bits:g}: {choice.average_bits:.2f} bits per weight, KL to "
        f"the teacher {choice.measured_kl:.3g} nats per token before training."
    )


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
        found["groups"] = tuple(GroupKL(**group) for group in found["groups"])
        return Choice(**found)
    except FileNotFoundError:
        raise UserError(
            f"quantization.auto has chosen nothing in {run_dir} yet: run `megaqad quantize` there first"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged: give another output_dir, or remove it to choose again") from None
