"""``megaqad export``: the NVFP4 Hugging Face checkpoint of a student, in ``export/``."""

from megaqad.commands.session import Session
from megaqad.commands.students import load_student
from megaqad.config import Settings
from megaqad.export.checkpoint import export_checkpoint
from megaqad.models.model import Model


def export(settings: Settings) -> None:
    """Every rank's part of the command."""
    session = Session.start(settings)
    write_export(session, load_student(session))


def write_export(session: Session, student: Model) -> None:
    """Write ``export/``, replacing this run's earlier one."""
    target = session.settings.run_dir / "export"
    plan, settings = session.plan, session.settings
    carried = export_checkpoint(student, plan, target, model_dir=settings.model_dir, layout=settings.export.format)
    session.terminal.say(f"exported {len(plan.formats)} quantized layers to {target}")
    if carried:
        more = f" and {len(carried) - 1} more tensors" if len(carried) > 1 else ""
        session.terminal.say(f"carried over unchanged, since this model does not compute with them: {carried[0]}{more}")
    if settings.export.format == "modelopt" and any(chosen.dynamic for chosen in plan.formats.values()):
        session.terminal.say(
            "it holds no input scales: TensorRT-LLM takes them from the inputs; vLLM and SGLang need "
            "quantization.activation_scales=static"
        )
