"""What a user says about distillation: the losses, the teacher, where its hidden states are kept.

No torch here, so that a mistake is refused within milliseconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.checks import check_checkpoint, check_layout, check_vocabularies
from megaqad.models.families import describe_model
from megaqad.models.trainable import trained_share
from megaqad.runtime.sizes import ParallelSizes

OBJECTIVES = ("qad", "qat")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "logit_mse", "cross_entropy")
HIDDEN_LOSSES = ("cosine", "cka")
TEACHERS = ("model", "self", "cached")


@dataclass(frozen=True)
class HiddenSettings:
    """Settings under ``distill.hidden.``: a loss on hidden states beside the one on logits."""

    weight: float = 0.0
    """Of this loss, per chosen layer. 0: none."""
    kind: str = "cosine"
    """``cosine``: distance of each token's two vectors, for equal widths. ``cka``: one minus the linear CKA of each
    microbatch's tokens, for any two widths; another ``train.micro_batch_size`` is another loss then."""
    layers: list[int] = field(default_factory=list)
    """After which layers, counted from 0; empty: all. The teacher's layer is the one with the same share of its model
    below it. Each stage compares its own, and keeps the teacher's of the whole global batch until then."""


@dataclass(frozen=True)
class DistillSettings:
    """Settings under ``distill.``: what the student learns from."""

    objective: str = "qad"
    """``qad``: the teacher's full distribution. ``qat``: cross entropy to the data, for comparison."""
    loss: dict[str, float] = field(default_factory=dict)
    """Weights of the parts of the QAD loss: ``forward_kl``, ``reverse_kl``, ``jsd``, ``logit_mse``, ``cross_entropy``,
    as in ``distill.loss={forward_kl:0.9,cross_entropy:0.1}``. Empty: forward KL alone."""
    temperature: float = 1.0
    """Of both distributions in the parts that compare with the teacher. The published runs use 1."""
    beta: float = 0.5
    """Of ``jsd``: near 0 like forward KL, near 1 like reverse KL."""
    teacher: str = "model"
    """``model``: the original checkpoint. ``self``: the same teacher bit for bit, without a second model: the student
    with its quantizers off, and of the weights that ``train.trainable`` names the original values, which is all that is
    kept; refused where every weight is trained. Or the directory of another checkpoint with the same tokens, of any
    depth and width; where one of the two has more ids (a padded or extended vocabulary), the distributions over the ids
    that both have are compared. Held-out numbers are always against ``model``. ``cached``: ``model`` with a
    ``distill.cache``."""
    cache: str | None = None
    """Directory for the teacher's last hidden states: computed once, then read by every epoch and every run over the
    same data. With a complete cache no teacher is loaded for training, only its output head. ``teacher=cached`` alone
    keeps it in ``output_dir``."""
    hidden: HiddenSettings = field(default_factory=HiddenSettings)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"distill.objective={self.objective} is unknown: choose one of {', '.join(OBJECTIVES)}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"distill.temperature={self.temperature} must be above 0")
        if not 0 < self.beta < 1:
            raise UserError(
                f"distill.beta={self.beta} must lie between 0 and 1: use forward_kl or reverse_kl for the ends"
            )
        for name, weight in self.loss.items():
            if name not in LOSSES:
                raise UserError(f"distill.loss has {name}, which is unknown: choose among {', '.join(LOSSES)}")
            if not 0 <= weight < math.inf:
                raise UserError(f"distill.loss.{name}={weight} must be a number from 0 up: a weight scales a loss")
        if self.loss and not any(self.loss.values()):
            raise UserError("distill.loss has no part with a weight above 0: give one, like {forward_kl:1}")
        if self.objective == "qat" and (self.loss or self.hidden.weight):
            raise UserError(
                "distill.loss and distill.hidden have no effect with distill.objective=qat: use objective=qad"
            )
        if self.hidden.kind not in HIDDEN_LOSSES:
            raise UserError(
                f"distill.hidden.kind={self.hidden.kind} is unknown: choose one of {', '.join(HIDDEN_LOSSES)}"
            )
        if not 0 <= self.hidden.weight < math.inf:
            raise UserError(f"distill.hidden.weight={self.hidden.weight} must be a number from 0 up")

    @property
    def qad_needs_teacher(self) -> bool:
        """Whether any part of QAD's loss compares with a teacher."""
        parts = [name for name, weight in self.loss.items() if weight] or ["forward_kl"]
        return self.hidden.weight > 0 or parts != ["cross_entropy"]


def check_teacher(distill: DistillSettings, student: Architecture, model_dir: Path, sizes: ParallelSizes) -> None:
    """Whether the teacher can teach this student, layer by layer where asked for.

    Raises:
        UserError: a checkpoint that cannot be read or divided, another vocabulary, or settings that do not fit the two.
    """
    teacher = student
    if distill.teacher not in TEACHERS:
        teacher_dir = Path(distill.teacher)
        teacher = describe_model(teacher_dir)
        check_layout(teacher, sizes)
        check_checkpoint(teacher, teacher_dir)
        check_vocabularies(student, model_dir, teacher, teacher_dir)
    if distill.cache is not None and distill.teacher == "self":
        raise UserError("distill.cache keeps what another model gives: leave it out with distill.teacher=self")
    hidden = distill.hidden
    if not hidden.weight:
        return
    if distill.cache is not None or distill.teacher == "cached":
        raise UserError("distill.cache holds last hidden states only: set distill.hidden.weight=0 or leave it out")
    if hidden.kind == "cosine" and teacher.hidden_size != student.hidden_size:
        raise UserError(
            f"distill.hidden.kind=cosine needs equal widths, but the teacher has {teacher.hidden_size} and the student "
            f"{student.hidden_size}: use cka"
        )
    for layer in hidden.layers:
        if not 0 <= layer < student.num_layers:
            raise UserError(
                f"distill.hidden.layers has {layer}: the student's layers are 0 to {student.num_layers - 1}"
            )


def check_self_teacher(distill: DistillSettings, student: Architecture, trainable: Sequence[str]) -> None:
    """Whether a student that is its own teacher saves any memory.

    It keeps the original values of what is trained. Where that is every weight they are a second model, as
    ``distill.teacher=model`` has one: who asked for none should hear so, and not find out from the memory that is gone.
    Short of that every frozen weight is stored once; how much that saves is printed when training begins, and whether
    it is worth it is the user's choice.

    Args:
        trainable: the patterns of ``train.trainable``.

    Raises:
        UserError: every weight is trained.
    """
    if distill.teacher != "self" or distill.objective != "qad" or not distill.qad_needs_teacher:
        return
    if trained_share(student, trainable) == 1:
        raise UserError(
            f"distill.teacher=self keeps the originals of what is trained, but train.trainable={list(trainable)} is "
            "every weight: set distill.teacher=model, which takes the same memory, or train fewer, like "
            "['model.layers.*.mlp.*']"
        )
