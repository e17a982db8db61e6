"""Every setting a user can see, typed, with every check that needs no rank and no weight.

``load_settings`` composes ``conf/`` with the overrides of the command line (Hydra) and builds ``Settings``; a field's
meaning stands below the field. ``check_settings`` then refuses what cannot work, before a rank is started: one line
that names the value, the limit and the way out.
"""

import ast
import inspect
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING as dataclass_missing
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megaqad.data.settings import DataSettings
from megaqad.distill_settings import TEACHERS, DistillSettings, check_self_teacher, check_teacher
from megaqad.errors import UserError
from megaqad.models.checks import check_checkpoint, check_layout, check_sequence_length
from megaqad.models.description import ModelDescription, describe_model
from megaqad.models.trainable import check_trainable
from megaqad.quantization.backend import check_backend
from megaqad.quantization.modelopt_recipe import is_modelopt_recipe, translate
from megaqad.quantization.recipe import HEAD, recipe_for
from megaqad.quantization.recipe_file import is_own_recipe, read_recipe_file
from megaqad.quantization.settings import QuantizationSettings, suggestion
from megaqad.runtime.duration import seconds_of
from megaqad.runtime.sizes import ParallelSizes

BUNDLED_TEACHER = Path(__file__).parent / "assets" / "teacher"
DTYPES = ("bfloat16", "float32")
EXPORT_FORMATS = ("modelopt",)
COMMANDS_THAT_DISTILL = ("demo", "recover", "distill")
COMMANDS_WITH_DATA = ("demo", "recover", "quantize", "distill", "evaluate", "pretrain")
PATH_SETTINGS = ("model", "output_dir", "tokens", "student", "distill.teacher", "distill.cache")
MADE_BY_RECIPE = tuple(
    f"quantization.{name}" for name in ("weights", "activations", "include", "exclude", "formats", "kv_cache")
)
"""Settings that a ModelOpt recipe makes."""
RECIPE_FILE = "recipe_file"
"""Name in Hydra's group ``quantization`` of the recipe file that the command line gives."""
_QUOTED_KEY = re.compile(r"""(["'])(.+?)\1\s*:""")
WANDB_MODES = ("offline", "online", "disabled")
NOT_FOR_USERS = ("full_key:", "object_type=", "reference_type=", "See ", "To append to your config")
"""Beginnings of lines in Hydra's messages that help nobody here; the last one repeats the value, a secret perhaps."""


@dataclass(frozen=True)
class ParallelSettings:
    """Settings under ``parallel.``: how the model and its batches are divided among ranks."""

    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Stages of consecutive layers."""
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank; more than 1 interleaves them (smaller bubble, more sends)."""
    context: int = 1
    """Ranks that share each sequence. Needs Transformer Engine's attention; 1 elsewhere."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    sequence: bool = False
    """Divide the activations between the tensor-parallel regions along the sequence as well."""
    data: int = 1
    """Model replicas when a command starts its own ranks. Under torchrun or srun the world decides."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings under ``train.``."""

    steps: int = 200
    """Optimizer steps."""
    lr: float = 1e-5
    """Peak learning rate. Too high a rate harms: 1e-4 cost a 9B model six points where 1e-6 cost none
    (arXiv 2601.20088)."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    global_batch_size: int = 64
    """Sequences per optimizer step, over all replicas."""
    micro_batch_size: int = 1
    """Sequences per forward pass of one replica."""
    sequence_length: int = 4096
    """Tokens per sequence."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_grad: float = 1.0
    """Largest L2 norm of the gradient; larger ones are scaled down to it."""
    adam_beta1: float = 0.9
    """Adam's first moment."""
    adam_beta2: float = 0.95
    """Adam's second moment."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """What trains, shell-style patterns on Hugging Face names of tensors or modules; the rest stays as it is. Learned
    scales are ``<module>.weight_scale``, ``scales`` means all of them (``[scales]``: scale-only training)."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    stop_after: str | None = None
    """Time since the command began, like ``3h50m``, after which training saves at its next step and ends with exit
    code 3, as after SIGTERM or SIGUSR1. The same command goes on."""
    max_bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, each skipped, after which training gives up."""
    spike_factor: float = 0.0
    """A loss above this many times the median of the last 20 goes back to the newest checkpoint and leaves out the
    training sequences since; 0 never does."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings under ``evaluation.``."""

    max_tokens: int = 262_144
    """Held-out tokens that every column of the report is a mean over; fewer when the data has fewer."""
    every: int = 0
    """Steps between held-out evaluations while training; 0 evaluates before and after only."""
    training_tokens: int = 16_384
    """Held-out tokens of those evaluations."""


@dataclass(frozen=True)
class CheckpointSettings:
    """Settings under ``checkpoint.``."""

    every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Newest checkpoints kept; older ones are removed. With 1, a damaged one leaves nothing to go back to."""
    keep_best: int = 1
    """Checkpoints kept beside them for the smallest validation KL, of those at whose step it was measured
    (``evaluation.every``)."""


@dataclass(frozen=True)
class ResumeSettings:
    """Settings under ``resume.``."""

    allow: list[str] = field(default_factory=list)
    """What may differ from the run that is gone on with: settings (``train.lr``), groups (``data``), ``model``,
    ``tokenizer``, ``seed``. Anything else that differs is refused."""


@dataclass(frozen=True)
class WandbSettings:
    """Settings under ``logging.wandb.``."""

    mode: str = "offline"
    """``offline`` writes beside the run, ``online`` sends."""
    project: str = "megaqad"
    """Project the run appears under."""


@dataclass(frozen=True)
class LoggingSettings:
    """Settings under ``logging.``. ``metrics.jsonl`` is always written."""

    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass(frozen=True)
class RuntimeSettings:
    """Settings under ``runtime.``."""

    dtype: str = "bfloat16"
    """Of parameters, activations and GEMMs. ``float32`` is for exact comparisons; exports are BF16/NVFP4 either way."""
    hang_timeout: str = "20m"
    """Without progress for this long in training or evaluation, every rank prints its stacks and the run ends."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings under ``export.``."""

    format: str = "modelopt"
    """Layout of the checkpoint: ModelOpt's unified Hugging Face layout, which vLLM, TensorRT-LLM and SGLang read."""


@dataclass(frozen=True)
class ReportSettings:
    """Settings under ``report.``."""

    compare_qat: bool = False
    """``recover`` also trains a QAT student from the same start, with the same steps and data, for the report."""
    sensitivity: bool = False
    """Also measure what quantizing each layer's attention and MLP alone costs: one forward pass over
    ``evaluation.training_tokens`` tokens for each. ``quantize`` does unless this is false."""


@dataclass(frozen=True)
class Settings:
    """All settings of a command."""

    model: str = ""
    """Directory of the BF16 Hugging Face checkpoint: the teacher, and the student's start. ``bundled``: the demo's."""
    output_dir: str = ""
    """Where the run writes everything."""
    tokens: str | None = None
    """``logits`` only: a .npy file of int64 token ids [b, s]."""
    student: str = "auto"
    """Which student ``evaluate``, ``export``, ``verify`` and ``logits`` load: ``auto`` (the newest checkpoint, else
    ``ptq``), ``ptq``, or a checkpoint directory."""
    data: DataSettings = field(default_factory=DataSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    seed: int = 1234
    """Of data order and of whatever is drawn at random."""

    @property
    def model_dir(self) -> Path:
        return BUNDLED_TEACHER if self.model == "bundled" else Path(self.model)

    @property
    def teacher_dir(self) -> Path:
        """The checkpoint that the student learns from."""
        return self.model_dir if self.distill.teacher in TEACHERS else Path(self.distill.teacher)

    @property
    def cache_dir(self) -> Path | None:
        """Where the teacher's hidden states are kept; None when they are not."""
        if self.distill.cache is not None:
            return Path(self.distill.cache)
        return self.run_dir / "teacher_cache" if self.distill.teacher == "cached" else None

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir)

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(**{key: value for key, value in asdict(self.parallel).items() if key != "data"})

    @property
    def local_ranks(self) -> int:
        """Ranks a plainly started command needs on this machine."""
        parallel = self.parallel
        return parallel.tensor * parallel.pipeline * parallel.context * parallel.data


def conf_dir() -> Path:
    """The Hydra configuration: inside the installed package, beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "conf"


def load_settings(overrides: Sequence[str]) -> Settings:
    """Compose ``conf/config.yaml`` with ``key=value`` overrides into typed settings.

    ``data=<file, directory or glob>`` is short for ``data=text data.files=[...]``.

    Raises:
        UserError: an unknown key or group, a value of the wrong type, a required setting missing.
    """
    ConfigStore.instance().store(name="settings", node=_schema())
    recipe, overrides = _without_modelopt_recipe([_with_recipe_file(override) for override in overrides])
    expanded = [part for override in overrides for part in _plain_paths(override)]
    try:
        with initialize_config_dir(config_dir=str(conf_dir().resolve()), version_base="1.3"):
            settings = OmegaConf.to_object(compose(config_name="config", overrides=expanded))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    except FrozenInstanceError as error:  # ``+group.name=`` has added what the settings do not have
        name = str(error).rpartition("field ")[2]
        raise UserError(f"{name} is no setting (megaqad <command> --help lists the settings)") from error
    assert isinstance(settings, Settings)
    return settings if recipe is None else _with_modelopt_recipe(settings, recipe)


def _with_recipe_file(override: str) -> str:
    """``quantization=<file>`` by the name under which Hydra then knows the file; other overrides as they are."""
    key, _, value = override.partition("=")
    if key != "quantization" or not is_own_recipe(value):
        return override
    ConfigStore.instance().store(group="quantization", name=RECIPE_FILE, node=read_recipe_file(value))
    return f"quantization={RECIPE_FILE}"


def _without_modelopt_recipe(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The ModelOpt recipe that ``quantization=`` names, and the overrides with ``none`` in its place.

    Raises:
        UserError: a recipe that does not exist, or settings beside a ModelOpt recipe that it makes itself.
    """
    recipes = sorted(path.stem for path in (conf_dir() / "quantization").glob("*.yaml"))
    found, kept = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "quantization":
            found = value if is_modelopt_recipe(value) else None
            if found is None and value not in (*recipes, RECIPE_FILE):
                raise UserError(f"quantization={value} is no recipe: {suggestion(value, recipes)}")
        kept.append("quantization=none" if key == "quantization" and found is not None else override)
    made = [override for override in kept if override.partition("=")[0] in MADE_BY_RECIPE]
    if found is not None and made:
        raise UserError(f"{made[0]} beside quantization={found}, which says that itself: change a copy of the file")
    return found, kept


def _with_modelopt_recipe(settings: Settings, recipe: str) -> Settings:
    if not settings.model:
        raise UserError("model is not set: give model=<directory>")
    translated = translate(recipe, settings.quantization, describe_model(settings.model_dir))
    return replace(settings, quantization=translated)


def _schema() -> DictConfig:
    """The typed schema that Hydra fills. OmegaConf makes frozen dataclasses read-only: undone until they are built."""
    schema = OmegaConf.structured(Settings)
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        OmegaConf.set_readonly(node, False)
        children = [node._get_node(key) for key in node]
        nodes += [child for child in children if isinstance(child, DictConfig)]
    assert isinstance(schema, DictConfig)
    OmegaConf.set_struct(schema.distill.loss, False)  # its keys are the user's choice, checked below
    return schema


def _plain_paths(override: str) -> list[str]:
    """Quote paths for Hydra's grammar, and turn ``data=<path>`` into the text group with that path."""
    key, separator, value = override.partition("=")
    if not separator or value.startswith(("'", '"')):
        return [override]
    quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if key in PATH_SETTINGS and value not in ("", "null"):
        return [f"{key}={quoted}"]
    if key == "quantization.formats":
        # Patterns are keys that no schema lists, hence ++. Hydra takes no quotes around keys, but escaped brackets.
        return [f"++{key}=" + _QUOTED_KEY.sub(lambda found: re.sub(r"([\[\]])", r"\\\1", found[2]) + ":", value)]
    groups = {path.stem for path in (conf_dir() / "data").glob("*.yaml")}
    if key != "data" or value in groups:
        return [override]
    if not value.strip():
        raise UserError(f"data= is empty: give a file, a directory, a glob, or one of {', '.join(sorted(groups))}")
    return ["data=text", f"data.files=[{quoted}]"]


def _one_line(error: BaseException) -> str:
    """What a Hydra error and its cause say, without the context lines."""
    said: list[str] = []
    while error is not None and len(said) < 2:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kept = [line for line in lines if not line.startswith(NOT_FOR_USERS)]
        said.append(" ".join(kept))
        if error.__cause__ is None:
            break
        error = error.__cause__
    return ": ".join(dict.fromkeys(said)) + " (megaqad <command> --help lists the settings)"


def world_size(settings: Settings) -> int:
    """Ranks of the run: what torchrun or srun started, else what the settings need on this machine."""
    return int(os.environ.get("WORLD_SIZE", settings.local_ranks))


def data_parallel_size(settings: Settings) -> int:
    """Model replicas in the run."""
    return world_size(settings) // settings.sizes.model_ranks


def check_settings(command: str, settings: Settings) -> ModelDescription:
    """Refuse what cannot work, before any rank exists: settings, layout, model files. Returns the model it read.

    Raises:
        UserError: the first mistake, in one line that names the value, the limit and the way out.
    """
    for name, value in (("model", settings.model), ("output_dir", settings.output_dir)):
        if not value:
            raise UserError(f"{name} is not set: give {name}=<directory>")
    reads_data = command in COMMANDS_WITH_DATA
    if reads_data and settings.data.source == "text" and not settings.data.files:
        raise UserError("data is not set: give data=<file.txt>, a directory or a glob, or data=stdlib")
    _check_values(settings)
    _check_world(settings)
    description = describe_model(settings.model_dir)
    check_layout(description, settings.sizes)
    if command != "pretrain":
        check_checkpoint(description, settings.model_dir)
    recipe = recipe_for(settings.quantization, description, settings.sizes.tensor)
    check_backend(settings.quantization, settings.runtime.dtype)
    learned = recipe.quantized_modules() if settings.quantization.weight_scales == "learned" else []
    check_trainable(description, settings.train.trainable, [name for name in learned if name != HEAD])
    if reads_data:
        check_sequence_length(description, settings.train.sequence_length, settings.sizes)
        _check_batches(settings)
    if settings.distill.teacher not in TEACHERS:
        check_sequence_length(describe_model(settings.teacher_dir), settings.train.sequence_length, settings.sizes)
    check_teacher(settings.distill, description, settings.model_dir, settings.sizes)
    if command in COMMANDS_THAT_DISTILL:
        check_self_teacher(settings.distill, description, settings.train.trainable)
    return description


def _check_values(settings: Settings) -> None:
    for name, value, choices in (
        ("runtime.dtype", settings.runtime.dtype, DTYPES),
        ("export.format", settings.export.format, EXPORT_FORMATS),
        ("logging.wandb.mode", settings.logging.wandb.mode, WANDB_MODES),
    ):
        if value not in choices:
            raise UserError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")
    parallel, train = settings.parallel, settings.train
    at_least_one = {
        **{f"parallel.{name}": size for name, size in asdict(parallel).items() if name != "sequence"},
        "train.steps": train.steps,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.sequence_length": train.sequence_length,
        "checkpoint.every": settings.checkpoint.every,
        "checkpoint.keep": settings.checkpoint.keep,
        "train.max_bad_steps": train.max_bad_steps,
        "evaluation.max_tokens": settings.evaluation.max_tokens,
    }
    for name, count in at_least_one.items():
        if count < 1:
            raise UserError(f"{name}={count} is too small: it must be 1 or more")
    if not 0 <= train.min_lr <= train.lr:
        raise UserError(f"train.min_lr={train.min_lr} must lie between 0 and train.lr={train.lr}")
    if not 0 <= train.warmup_steps < train.steps:
        raise UserError(f"train.warmup_steps={train.warmup_steps} must lie between 0 and train.steps={train.steps} - 1")
    _check_resilience(settings)


def _check_resilience(settings: Settings) -> None:
    """Settings of checkpoints, stops and faults."""
    if settings.checkpoint.keep_best < 0:
        raise UserError(f"checkpoint.keep_best={settings.checkpoint.keep_best} is negative: use 0 to keep none for it")
    if settings.train.spike_factor != 0 and settings.train.spike_factor <= 1:
        raise UserError(f"train.spike_factor={settings.train.spike_factor} must be 0 (never) or above 1, like 3")
    if settings.train.stop_after is not None:
        seconds_of(settings.train.stop_after, "train.stop_after")
    seconds_of(settings.runtime.hang_timeout, "runtime.hang_timeout")


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
    if parallel.expert > 1:
        raise UserError(f"parallel.expert={parallel.expert} needs a mixture-of-experts model: set parallel.expert=1")
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
    parallel = settings.parallel
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"{micro_batches} microbatches per step do not divide by parallel.pipeline={parallel.pipeline}, which the "
            f"interleaved schedule needs: make train.global_batch_size a multiple of {share * parallel.pipeline}"
        )


def settings_help() -> str:
    """Every setting with its default and its meaning, read from this file and its parts."""
    return "\n".join(_describe_fields(Settings, ""))


def _describe_fields(kind: type, prefix: str) -> list[str]:
    """Lines for the fields of a settings class: the docstring below each field is its meaning."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    meanings = {
        field_node.target.id: " ".join(str(text.value.value).split())
        for field_node, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field_node, ast.AnnAssign)
        and isinstance(field_node.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    lines = []
    for setting in fields(kind):
        default = setting.default if setting.default_factory is dataclass_missing else setting.default_factory()
        if is_dataclass(default):
            lines += _describe_fields(type(default), f"{prefix}{setting.name}.")
        else:
            shown = "required" if default == "" else f"default {default}"
            meaning = textwrap.wrap(meanings[setting.name], 100, initial_indent="    ", subsequent_indent="    ")
            lines += [f"{prefix}{setting.name}  ({shown})", *meaning]
    return lines
