"""The Python API: what the commands do, for a notebook or another trainer.

One rank, or under torchrun or srun all of them; every function is collective over the ranks of the session::

    session.py      what the stages share: ranks, data, teacher, students
    stages.py       quantize, distill, evaluate, export, verify, recover
    students.py     the quantized student, loading one, measuring one
    teaching.py     what it learns from: the teacher and the losses
    sensitivity.py  what each layer costs when quantized alone
    logits.py       logits gathered from any layout
"""

from collections.abc import Sequence

from megaqad.config import check_data, check_form, check_settings, load_settings
from megaqad.errors import UserError
from megaqad.identity import check_output_dir, identity_of
from megaqad.recovery.session import Session
from megaqad.recovery.stages import distill, evaluate, export, quantize, recover, verify
from megaqad.runtime import launch

__all__ = ["Session", "distill", "evaluate", "export", "quantize", "recover", "start", "verify"]


def start(overrides: Sequence[str]) -> Session:
    """Open or continue the run in ``output_dir``; use it in a ``with`` statement, or close it.

    Args:
        overrides: the settings, as on the command line: ``["model=<dir>", "data=<path>", "output_dir=<dir>", ...]``.

    Raises:
        UserError: as the command would say; or a layout of several ranks where only one was started.
    """
    launch.adopt_slurm_environment()
    check_form(overrides)
    settings = load_settings(overrides)
    architecture = check_settings("recover", settings)
    if not launch.is_rank() and settings.local_ranks > 1:
        raise UserError(
            f"this layout needs {settings.local_ranks} ranks and Python was started as one: start it with "
            f"`torchrun --nproc-per-node {settings.local_ranks}`, or leave parallel.* at 1"
        )
    check_output_dir(settings, identity_of("recover", settings, contents=False))
    check_data("recover", settings, architecture, read_text=not launch.is_rank())
    return Session.start(settings, command="recover")
