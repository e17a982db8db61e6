"""``megaqad export``: the NVFP4 Hugging Face checkpoint of a student, in ``export/``."""

import shutil

from megaqad.commands.session import Session
from megaqad.commands.students import load_student
from megaqad.config import Settings
from megaqad.export.modelopt import export_modelopt
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.state import input_amaxes


def export(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    write_export(session, load_student(session))


def write_export(session: Session, student: list[CausalLM]) -> None:
    """Write ``export/``, replacing this run's earlier one."""
    target = session.settings.run_dir / "export"
    if session.context.is_main and (target / "hf_quant_config.json").is_file():
        shutil.rmtree(target)
    weight_only = session.recipe.settings.activations == "none"
    export_modelopt(
        student,
        session.description,
        session.context,
        target,
        model_dir=session.settings.model_dir,
        modules=session.recipe.quantized_modules(),
        input_amax=None if weight_only else input_amaxes(student),
    )
    session.terminal.say(f"exported {len(session.recipe.quantized_modules())} NVFP4 layers to {target}")
