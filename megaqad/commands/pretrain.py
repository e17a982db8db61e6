"""``megaqad pretrain``: train a model of ``model``'s config.json from random weights, with the same trainer.

This is how the demo's teacher was made. ``output_dir/model`` is a BF16 Hugging Face checkpoint; ``pretrain.json``
holds its held-out cross entropy.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict

from megaqad.config import Settings
from megaqad.distillation.step import DistillationStep, Objective
from megaqad.distillation.teachers import LiveTeacher
from megaqad.evaluation import Evaluator
from megaqad.models.model import Model
from megaqad.models.write import save_pretrained
from megaqad.recovery.session import Session
from megaqad.training.freezing import balance_experts, freeze
from megaqad.training.optimizer import build_optimizer, wrap_for_training
from megaqad.training.run import TrainingRun


def pretrain(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings, command="pretrain")
    model = session.random_model()
    freeze(model, settings.train.trainable, routers=settings.train.router != "frozen")
    balance_experts(model, settings.train.router_balance)
    student = wrap_for_training(model)
    optimizer, scheduler = build_optimizer(student, settings.train, session.dtype, fused=settings.runtime.fused)

    def evaluator(max_tokens: int) -> Evaluator:
        return Evaluator(
            LiveTeacher(model),
            session.data.validation,
            max_tokens=max_tokens,
            micro_batch_size=settings.train.micro_batch_size,
        )

    def validate(advance: Callable[[], None]) -> dict[str, float]:
        numbers = evaluator(settings.evaluation.training_tokens).evaluate(model, advance)
        return {"cross_entropy": numbers.cross_entropy}

    TrainingRun(
        run_dir=settings.run_dir,
        settings=settings,
        terminal=session.terminal,
        title="pretrain",
        model=model,
        step=DistillationStep(model, student, optimizer, scheduler, objective=Objective.QAT),
        data=session.data.train,
        fingerprint=session.identity,
        validate=validate,
    ).run()
    _save(session, model)
    held_out = evaluator(settings.evaluation.max_tokens).evaluate(model)
    if session.ranks.is_main:
        summary = {"held_out_cross_entropy": held_out.cross_entropy, "held_out_tokens": held_out.tokens}
        text = json.dumps({**summary, "settings": asdict(settings)}, indent=2) + "\n"
        (settings.run_dir / "pretrain.json").write_text(text, encoding="utf-8")
    session.terminal.say(f"held-out cross entropy {held_out.cross_entropy:.4f} over {held_out.tokens:,} tokens")


def _save(session: Session, model: Model) -> None:
    """Replace ``output_dir/model`` by the model as it is now."""
    target = session.settings.run_dir / "model"
    if session.ranks.is_main:
        shutil.rmtree(target, ignore_errors=True)
    save_pretrained(model, target, model_dir=session.settings.model_dir)
