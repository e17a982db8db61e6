"""``megaqad export``: the NVFP4 Hugging Face checkpoint of a student, in ``export/``."""

import shutil

from megaqad.commands.session import Session
from megaqad.commands.students import load_student
from megaqad.config import Settings
from megaqad.export.checkpoint import Quantization, export_checkpoint
from megaqad.export.manifest import MANIFEST_FILE
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.state import cache_amaxes, input_amaxes


def export(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    write_export(session, load_student(session))


def write_export(session: Session, student: list[CausalLM]) -> None:
    """Write ``export/``, replacing this run's earlier one."""
    target = session.settings.run_dir / "export"
    if session.context.is_main and (target / MANIFEST_FILE).is_file():
        shutil.rmtree(target)
    recipe = session.recipe
    export_checkpoint(
        student,
        session.description,
        session.context,
        target,
        model_dir=session.settings.model_dir,
        layout=session.settings.export.format,
        quantization=Quantization(recipe.formats, input_amaxes(student), recipe.kv_cache, cache_amaxes(student)),
    )
    session.terminal.say(f"exported {len(recipe.formats)} quantized layers to {target}")
    if session.settings.export.format == "modelopt" and any(chosen.dynamic for chosen in recipe.formats.values()):
        session.terminal.say(
            "it holds no input scales: TensorRT-LLM takes them from the inputs; vLLM and SGLang need "
            "quantization.activation_scales=static"
        )
