"""Every check of the settings and of the data that needs no rank and no weight, made before a rank is started.

A refusal is one line that names the value, the limit and the way out.
"""

import os
from dataclasses import fields
from operator import attrgetter

from megaqad.config.settings import SHAPES, ParallelSettings, Settings
from megaqad.data import build_datasets, read_token_file
from megaqad.data.sources import split_files
from megaqad.distill_settings import TEACHERS, check_self_teacher, check_teacher
from megaqad.errors import UserError
from megaqad.models.architecture import Architecture
from megaqad.models.checks import check_checkpoint, check_layout, check_sequence_length
from megaqad.models.families import describe_model
from megaqad.models.operations import FUSED
from megaqad.models.trainable import check_trainable
from megaqad.quantization.backend import check_backend
from megaqad.quantization.formats import cache_number
from megaqad.quantization.plan import QuantizationPlan, plan_for
from megaqad.runtime.duration import seconds_of

CHOICES = {
    "runtime.dtype": ("bfloat16", "float32"),
    "runtime.fused": FUSED,
    "export.format": ("modelopt", "compressed_tensors"),
    "verify.model": ("auto", "full", "streamed", "files", "off"),
    "logging.wandb.mode": ("offline", "online", "disabled"),
    "train.router": ("auto", "frozen", "trained"),
}
AT_LEAST_ONE = (
    *(f"parallel.{axis.name}" for axis in fields(ParallelSettings) if axis.name != "sequence"),
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.sequence_length",
    "train.max_bad_steps",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.max_tokens",
)
COMMANDS_THAT_DISTILL = ("demo", "recover", "distill")
COMMANDS_THAT_START = ("demo", "recover", "quantize", "distill")
COMMANDS_WITH_DATA = ("demo", "recover", "quantize", "distill", "evaluate", "pretrain", "bench step")
COMMAND_ON_SHAPES = "bench step"
COMMANDS_WITH_TOKENS = ("demo", "recover", "verify", "logits")
HOW_TO_GIVE_DATA = "give data=<file.txt>, a directory or a glob, or data=stdlib"


def world_size(settings: Settings) -> int:
    """Ranks of the run: what torchrun or srun started, else what the settings need on this machine."""
    return int(os.environ.get("WORLD_SIZE", settings.local_ranks))


def data_parallel_size(settings: Settings) -> int:
    """Model replicas in the run."""
    return world_size(settings) // settings.sizes.model_ranks


def check_settings(command: str, settings: Settings) -> Architecture:
    """Refuse what cannot work, before any rank exists: settings, layout, model files. Returns the model it read.

    Raises:
        UserError: the first mistake, in one line that names the value, the limit and the way out.
    """
    for name, value in (("model", settings.model), ("output_dir", settings.output_dir)):
        if not value:
            raise UserError(f"{name} is not set: give {name}=<directory>")
    reads_data = command in COMMANDS_WITH_DATA
    if reads_data and settings.data.source == "text" and not settings.data.files:
        raise UserError(f"data is not set: {HOW_TO_GIVE_DATA}")
    _check_values(settings)
    _check_world(settings)
    if settings.has_random_weights:
        _check_shape(command, settings)
    architecture = describe_model(settings.model_dir)
    check_layout(architecture, settings.sizes)
    if command != "pretrain" and not settings.has_random_weights:
        check_checkpoint(architecture, settings.model_dir)
    _check_start(command, settings, architecture)
    plan = plan_for(settings.quantization, architecture, settings.sizes.tensor)
    _check_export(settings, plan)
    check_backend(settings.quantization, settings.runtime.dtype)
    learned = list(plan.formats) if settings.quantization.weight_scales == "learned" else []
    check_trainable(architecture, settings.train.trainable, [name for name in learned if name != architecture.head])
    if reads_data:
        check_sequence_length(architecture, settings.train.sequence_length, settings.sizes)
        _check_batches(settings)
    if settings.distill.teacher not in TEACHERS:
        check_sequence_length(describe_model(settings.teacher_dir), settings.train.sequence_length, settings.sizes)
    check_teacher(settings.distill, architecture, settings.model_dir, settings.sizes)
    if command in COMMANDS_THAT_DISTILL:
        check_self_teacher(settings.distill, architecture, settings.train.trainable)
    return architecture


def _check_shape(command: str, settings: Settings) -> None:
    """``model=random:<name>``: a name that exists, for a command that needs no weights."""
    if command != COMMAND_ON_SHAPES:
        raise UserError(
            f"model={settings.model} has no weights: it is for {COMMAND_ON_SHAPES}, give a model's directory"
        )
    if not settings.model_dir.is_dir():
        known = ", ".join(sorted(path.name for path in SHAPES.iterdir()))
        raise UserError(f"model={settings.model} is no shape: choose random: with one of {known}")


def check_data(command: str, settings: Settings, architecture: Architecture, *, read_text: bool) -> None:
    """Refuse data that cannot be used, as ``check_settings`` does settings; apart, because this takes time.

    Args:
        read_text: read the text as the ranks will, and leave them its tokens in the cache. For the process that starts
            them: under torchrun and srun every rank would, so there one does while the others wait (``Session``), and
            here only the files are looked for.

    Raises:
        UserError: the first thing that is wrong with the data, or with the file of ``tokens``.
    """
    if command == "logits" or (command in COMMANDS_WITH_TOKENS and settings.tokens is not None):
        tokens, tensor = read_token_file(settings.tokens, architecture.vocab_size), settings.parallel.tensor
        if settings.parallel.sequence and tokens.shape[1] % tensor:
            raise UserError(
                f"tokens={settings.tokens} are {tokens.shape[1]} long, which does not divide by parallel.tensor="
                f"{tensor}: set parallel.sequence=false"
            )
    if command not in COMMANDS_WITH_DATA:
        return
    if read_text:
        length = settings.train.sequence_length
        build_datasets(settings.data, model_dir=settings.model_dir, sequence_length=length, seed=settings.seed)
    else:
        split_files(settings.data)


def _check_start(command: str, settings: Settings, architecture: Architecture) -> None:
    """``student`` as a Hugging Face directory: of this architecture, and something that the command can begin with."""
    start, named = settings.start_dir, f"student={settings.student}"
    if start == settings.model_dir:
        if command in COMMANDS_THAT_START and settings.student not in ("auto", "ptq"):
            raise UserError(
                f"{named} holds no config.json: {command} starts from a Hugging Face directory, an export for one, and "
                "resumes from a checkpoint by itself, in the same output_dir"
            )
        return
    if describe_model(start).tensors != architecture.tensors:
        raise UserError(f"{named} has other tensors than model={settings.model}: give a student of the same model")
    check_checkpoint(architecture, start)
    if settings.data.source == "text" and not settings.data.files:
        raise UserError(f"{named} is calibrated anew: {HOW_TO_GIVE_DATA}")


def _check_values(settings: Settings) -> None:
    for name, choices in CHOICES.items():
        value = attrgetter(name)(settings)
        if value not in choices:
            raise UserError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")
    for name in AT_LEAST_ONE:
        count = attrgetter(name)(settings)
        if count < 1:
            raise UserError(f"{name}={count} is too small: it must be 1 or more")
    train = settings.train
    if not 0 <= train.min_lr <= train.lr:
        raise UserError(f"train.min_lr={train.min_lr} must lie between 0 and train.lr={train.lr}")
    if not 0 <= train.warmup_steps < train.steps:
        raise UserError(f"train.warmup_steps={train.warmup_steps} must lie between 0 and train.steps={train.steps} - 1")
    if settings.checkpoint.keep_best < 0:
        raise UserError(f"checkpoint.keep_best={settings.checkpoint.keep_best} is negative: use 0 to keep none for it")
    if train.spike_factor != 0 and train.spike_factor <= 1:
        raise UserError(f"train.spike_factor={train.spike_factor} must be 0 (never) or above 1, like 3")
    if train.stop_after is not None:
        seconds_of(train.stop_after, "train.stop_after")
    seconds_of(settings.runtime.hang_timeout, "runtime.hang_timeout")


def _check_export(settings: Settings, plan: QuantizationPlan) -> None:
    """What export.format=compressed_tensors has no words for."""
    if settings.export.format != "compressed_tensors":
        return
    if cache_number(plan.kv_cache) == "nvfp4":
        raise UserError(
            f"export.format=compressed_tensors has no quantization.kv_cache={plan.kv_cache}: set "
            f"quantization.kv_cache={plan.kv_cache.replace('nvfp4', 'fp8')}, or export.format=modelopt"
        )
    dynamic = [name for name, chosen in plan.formats.items() if chosen.dynamic and chosen.activations == "nvfp4"]
    if dynamic:
        raise UserError(
            f"export.format=compressed_tensors has no NVFP4 inputs with quantization.activation_scales=dynamic, as of "
            f"{dynamic[0]}: its readers want a calibrated scale, set static, or export.format=modelopt"
        )


def _check_world(settings: Settings) -> None:
    parallel = settings.parallel
    ranks = world_size(settings)
    needed = settings.sizes.model_ranks
    if ranks % needed:
        raise UserError(
            f"{ranks} ranks were started, but parallel.tensor={parallel.tensor} x parallel.pipeline="
            f"{parallel.pipeline} x parallel.context={parallel.context} needs a multiple of {needed}: "
            "start that many or change the layout"
        )
    if parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context} needs Transformer Engine's attention, which this build does not use: "
            "set parallel.context=1"
        )
    if data_parallel_size(settings) % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} divides experts among data-parallel replicas, of which there are "
            f"{data_parallel_size(settings)}: make parallel.data a multiple of it"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true divides work among tensor-parallel ranks: set parallel.tensor above 1")


def _check_batches(settings: Settings) -> None:
    train, replicas = settings.train, data_parallel_size(settings)
    share = train.micro_batch_size * replicas
    if train.global_batch_size % share:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} does not divide by train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel replicas: choose a multiple of {share}"
        )
    micro_batches = train.global_batch_size // share
    of_teacher = train.teacher_micro_batch_size
    if of_teacher is not None and (of_teacher < 1 or of_teacher % train.micro_batch_size):
        raise UserError(
            f"train.teacher_micro_batch_size={of_teacher} must be a multiple of train.micro_batch_size="
            f"{train.micro_batch_size}: its microbatches are put together"
        )
    if of_teacher not in (None, train.micro_batch_size) and settings.distill.hidden.weight:
        raise UserError(
            f"train.teacher_micro_batch_size={of_teacher} beside distill.hidden, which compares microbatch by "
            "microbatch: leave it out"
        )
    parallel = settings.parallel
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"{micro_batches} microbatches per step do not divide by parallel.pipeline={parallel.pipeline}, which the "
            f"interleaved schedule needs: make train.global_batch_size a multiple of {share * parallel.pipeline}"
        )
