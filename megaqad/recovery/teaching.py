"""What a student learns from, from the settings under ``distill.``: the teacher and the losses."""

from collections.abc import Mapping
from typing import Any

import torch

from megaqad.distill_settings import TEACHERS
from megaqad.distillation.cache import HiddenCache, tokens_digest
from megaqad.distillation.hidden import HiddenLoss
from megaqad.distillation.teachers import CachedTeacher, LiveTeacher, SelfTeacher, Teacher
from megaqad.identity import model_fingerprint
from megaqad.losses import Objective, build_objective
from megaqad.models.load import load_head, original_values
from megaqad.models.model import Model
from megaqad.models.trainable import trained_share
from megaqad.recovery.session import Session
from megaqad.runtime.agree import on_main

TOKENS_AT_ONCE = 16_384
"""Through the teacher on CUDA; more do not make its products faster."""


def divergence_of(session: Session) -> Objective:
    """The QAD loss on logits."""
    distill = session.settings.distill
    return build_objective(distill.loss or {"forward_kl": 1.0}, temperature=distill.temperature, beta=distill.beta)


def teacher_of(session: Session, student: Model) -> Teacher:
    """``distill.teacher``, behind ``distill.cache`` when there is one.

    Args:
        student: bare, with ``requires_grad`` on what is trained.

    Collectives: of a teacher that is built, and ``on_main`` for a cache.

    Raises:
        UserError: a cache of another teacher or other data.
    """
    settings = session.settings
    if settings.distill.teacher == "self":
        return _self_teacher(session, student)
    if settings.cache_dir is None:
        return _live(session)
    identity = session.identity
    facts = on_main(lambda: _cache_facts(session, identity))
    cache = HiddenCache(settings.cache_dir, facts, session.ranks)
    return CachedTeacher(cache, _head(session), lambda: _live(session), session.ranks)


def _live(session: Session) -> Teacher:
    settings = session.settings
    original = settings.distill.teacher in TEACHERS
    model = session.teacher if original else session.frozen(settings.teacher_dir)
    return LiveTeacher(model, sequences=teacher_sequences(session))


def teacher_sequences(session: Session) -> int:
    """How many go through the teacher together."""
    train = session.settings.train
    if train.teacher_micro_batch_size is not None:
        return train.teacher_micro_batch_size
    one_by_one = session.ranks.device.type != "cuda" or session.settings.distill.hidden.weight
    return train.micro_batch_size if one_by_one else TOKENS_AT_ONCE // train.sequence_length


def _self_teacher(session: Session, student: Model) -> Teacher:
    """Originals come from the model's files, so it does not matter how far the student has been trained already."""
    share = trained_share(session.architecture, session.settings.train.trainable)
    session.terminal.say(f"the student is its own teacher; kept besides: the originals of {share:.1%} of its weights")
    return SelfTeacher(student, original_values(student, session.settings.start_dir))


def _cache_facts(session: Session, identity: Mapping[str, Any]) -> dict[str, str | int]:
    settings = session.settings
    known = settings.teacher_dir == settings.model_dir
    return {
        "teacher": identity["model"] if known else model_fingerprint(settings.teacher_dir),
        "tokenizer": identity["tokenizer"],
        "data": tokens_digest(session.data.train.tokens),
        "sequence_length": settings.train.sequence_length,
        "dtype": settings.runtime.dtype,
    }


def _head(session: Session) -> torch.Tensor | None:
    """This rank's rows of the teacher's output head, read alone."""
    ranks, teacher_dir = session.ranks, session.settings.teacher_dir
    if not ranks.is_last_stage:
        return None
    teacher = session.described(teacher_dir)
    rows = load_head(teacher, teacher_dir, ranks.tensor_rank, ranks.sizes.tensor, session.dtype)
    return rows.to(ranks.device)


def hidden_loss_of(session: Session, student: Model, teacher: Model | None) -> HiddenLoss | None:
    """The loss on hidden states, if one is asked for."""
    hidden = session.settings.distill.hidden
    if not hidden.weight:
        return None
    assert teacher is not None, "cached hidden states are refused with the settings"
    return HiddenLoss(student, teacher, weight=hidden.weight, kind=hidden.kind, layers=hidden.layers)
