"""The command line: ``megaqad <command> key=value ...``.

Checks the settings first, then the data, before any rank exists; starts this machine's ranks when the command needs
several and no launcher has; then runs the command on this rank. Exit codes: 0 done; 2 a mistake of the user's,
one line on standard error; 3 stopped early with everything saved; anything else is a defect.
"""

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaqad.errors import EXIT_STOPPED_EARLY, EXIT_USER_ERROR, StoppedEarly, UserError
from megaqad.runtime import launch, signals


@dataclass(frozen=True)
class Command:
    """One command: where its code is and what ``--help`` says."""

    module: str
    summary: str
    presets: tuple[str, ...] = ()
    """Overrides that come before the user's."""
    writes_run: bool = False
    """Starts or continues the run in ``output_dir``, rather than reading it."""
    reads_student: bool = False
    """Works on the student of the run in ``output_dir``."""
    needs_model: bool = True
    """Works on a model and so has settings."""
    flags: tuple[str, ...] = ()
    """What may stand among its settings: ``--profile`` is ``profile=True`` to its function."""


COMMANDS = {
    "demo": Command(
        "demo",
        "the whole journey on the bundled teacher, on this CPU, no download",
        ("experiment=demo",),
        writes_run=True,
    ),
    "recover": Command("recover", "quantize, distil, evaluate, export, verify and report", writes_run=True),
    "quantize": Command(
        "quantize",
        "calibrate and measure the gap of post-training quantization, layer by layer too",
        ("report.sensitivity=true",),
        writes_run=True,
    ),
    "distill": Command(
        "distill", "train the quantized student against the teacher; resumes by itself", writes_run=True
    ),
    "evaluate": Command("evaluate", "held-out KL to the teacher, cross entropies, top-1 agreement", reads_student=True),
    "export": Command("export", "write the NVFP4 Hugging Face checkpoint", reads_student=True),
    "verify": Command(
        "verify", "read the export back as a client would and compare it with the student", reads_student=True
    ),
    "report": Command("report", "write the page and its numbers"),
    "logits": Command("logits", "tokens=<npy int64 [b, s]> through the teacher or the student", reads_student=True),
    "bench kl": Command("bench", "the loss beside its peers: time, memory, errors", needs_model=False),
    "bench nvfp4": Command("bench", "the number format's implementations: time, bandwidth", needs_model=False),
    "bench blackwell": Command(
        "bench", "Transformer Engine's NVFP4 layers beside the emulated ones: checks, speeds", needs_model=False
    ),
    "bench step": Command(
        "bench",
        "a QAD step beside a fine-tuning step, part by part; --profile: with its kernels",
        ("experiment=demo",),
        flags=("--profile",),
    ),
    "pretrain": Command("pretrain", "train a model from random weights with cross entropy", writes_run=True),
}


def usage() -> str:
    """What ``megaqad --help`` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: megaqad <command> [key=value ...]\n\n"
        f"commands\n{rows}\n\n"
        "megaqad <command> --help lists the settings with their meaning and value.\n"
        "Started plainly, a command starts the ranks it needs; under torchrun or srun it joins them."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a table that the terminal cannot show ends no run
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USER_ERROR
    try:
        return _run(*_split_command(arguments))
    except UserError as error:
        launch.report_line("megaqad: " + " ".join(str(error).split()), EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except StoppedEarly as stop:
        launch.report_line(f"megaqad: {stop}", EXIT_STOPPED_EARLY)
        return EXIT_STOPPED_EARLY
    except Exception as error:
        if signals.stop_number() and launch.is_rank():  # another rank has stopped already
            launch.report_line(f"megaqad: {signals.stop_reason()}", EXIT_STOPPED_EARLY)
            return EXIT_STOPPED_EARLY
        launch.report_failure(error)
        return 1


def _split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and its overrides."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    raise UserError(f"{' '.join(arguments[:2])!r} is no command: choose one of {', '.join(COMMANDS)}")


def _run(name: str, overrides: list[str]) -> int:
    command = COMMANDS[name]
    from megaqad import config, identity

    if "-h" in overrides or "--help" in overrides:
        print(f"megaqad {name}: {command.summary}" + (f"\n\n{config.settings_help()}" if command.needs_model else ""))
        return 0
    if not command.needs_model:
        if overrides:
            raise UserError(f"{overrides[0]!r} has no effect: megaqad {name} takes no settings")
        _quiet_imports()
        _function(name)()
        return 0
    launch.adopt_slurm_environment()
    if launch.is_rank():
        launch.end_with_launcher()
        signals.listen()
    given, overrides = overrides, [one for one in overrides if one not in command.flags]
    flags = {flag.removeprefix("--"): True for flag in command.flags if flag in given}
    config.check_form(overrides)
    settings = config.load_settings([*command.presets, *overrides])
    architecture = config.check_settings(name, settings)
    if command.writes_run:
        identity.check_output_dir(settings, identity.identity_of(name, settings, contents=False))
    if command.reads_student:
        identity.check_student(settings)
    _quiet_imports()
    if not launch.is_rank():
        with signals.raised():
            config.check_data(name, settings, architecture, read_text=True)
        if settings.local_ranks > 1:
            return launch.run_ranks_here([name, *given], settings.local_ranks)
        signals.listen()
    elif not launch.has_launcher():  # ours has checked them
        config.check_data(name, settings, architecture, read_text=False)
    _function(name)(settings, **flags)
    from megaqad.runtime.ranks import leave_ranks

    leave_ranks()
    return 0


def _function(name: str) -> Callable[..., None]:
    """The code of a command; imported only now, because torch and Megatron-Core take seconds."""
    module = importlib.import_module(f"megaqad.commands.{COMMANDS[name].module}")
    function: Callable[..., None] = vars(module)[name.replace(" ", "_")]
    return function


def _quiet_imports() -> None:
    """Megatron-Core announces at import which optional packages it does without; none is needed here."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|transformer_engine).*")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated.*")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
