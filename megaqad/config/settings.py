"""Every setting a user can see, typed; a field's meaning stands below the field."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from megaqad.data.settings import DataSettings
from megaqad.distill_settings import TEACHERS, DistillSettings
from megaqad.quantization.settings import QuantizationSettings
from megaqad.runtime.sizes import ParallelSizes

ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED_TEACHER = ASSETS / "teacher"
SHAPES = ASSETS / "shapes"
"""config.json of well-known models, by the names of ``model=random:<name>``."""
RANDOM = "random:"


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(ParallelSizes):
    """Settings under ``parallel.``: how the model and its batches are divided among ranks."""

    data: int = 1
    """Model replicas when a command starts its own ranks; at least ``parallel.expert``. Under torchrun or srun the
    world decides."""


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
    teacher_micro_batch_size: int | None = None
    """Of the teacher's pass, which keeps nothing for a backward one. Left out: on CUDA whole microbatches up to 16,384
    tokens together, on the CPU one by one."""
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
    router: str = "auto"
    """Routers of experts: ``frozen``, so that the student routes by the teacher's weights; ``trained``, as far as
    ``trainable`` names them; ``auto``: trained by ``pretrain``, frozen else."""
    router_balance: float = 0.0
    """Weight of a loss that keeps experts equally busy (Switch Transformers, arXiv 2101.03961, section 2.2), for
    ``pretrain`` from random weights. Distillation needs none: the teacher's routing is what it keeps."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    stop_after: str | None = None
    """Time since the command began, like ``3h50m``, after which training saves at its next step and ends with exit
    code 3, as after SIGTERM or SIGUSR1. The same command resumes."""
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
    """What may differ from the run that is resumed: settings (``train.lr``), groups (``data``), ``model``,
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
    fused: str = "auto"
    """``auto``: norms, rotary embeddings, gates and windows of attention by one kernel each on CUDA, by plain PyTorch
    on the CPU. ``plain``: by plain PyTorch everywhere, to compare with."""
    hang_timeout: str = "20m"
    """Without progress for this long in training or evaluation, every rank prints its stacks and the run ends."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings under ``export.``."""

    format: str = "modelopt"
    """Layout of the checkpoint: ``modelopt``, ModelOpt's unified Hugging Face layout, which vLLM, TensorRT-LLM and
    SGLang read; ``compressed_tensors``, the library's, which vLLM, SGLang and transformers itself read."""


@dataclass(frozen=True)
class VerifySettings:
    """Settings under ``verify.``: how an export is compared with the student; ``recover`` does so too."""

    model: str = "auto"
    """How much of the exported model the main rank runs, with transformers: ``full``, all of it in memory;
    ``streamed``, one layer at a time; ``files``, nothing: files, tensors and scales are checked, no logits; ``off``: no
    verification. ``auto`` is ``full`` where the model takes less than a third of the available memory, else
    ``streamed``."""


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
    """Directory of the BF16 Hugging Face checkpoint: the teacher, and the student's start. ``bundled``: the demo's.
    For ``bench step`` also ``random:llama-1b``, ``random:qwen3-8b``, ``random:qwen3-30b-a3b`` or ``random:tiny``: such
    a model with random weights."""
    output_dir: str = ""
    """Where the run writes everything."""
    tokens: str | None = None
    """A .npy file of int64 token ids [b, s], for ``logits``; ``verify`` compares on them where they are given."""
    student: str = "auto"
    """Which student ``evaluate``, ``export``, ``verify`` and ``logits`` load: ``auto`` (the newest checkpoint, else
    ``ptq``), ``ptq``, or a checkpoint directory. A Hugging Face directory of the same architecture, an export among
    them, is where ``quantize``, ``distill`` and ``recover`` start in place of ``model``, which stays the teacher: its
    weights are read as the BF16 values they stand for and calibrated anew."""
    data: DataSettings = field(default_factory=DataSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    verify: VerifySettings = field(default_factory=VerifySettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    seed: int = 1234
    """Of data order and of whatever is drawn at random."""

    @property
    def model_dir(self) -> Path:
        if self.has_random_weights:
            return SHAPES / self.model.removeprefix(RANDOM)
        return BUNDLED_TEACHER if self.model == "bundled" else Path(self.model)

    @property
    def has_random_weights(self) -> bool:
        """Whether the model is a shape whose weights are drawn on the device."""
        return self.model.startswith(RANDOM)

    @property
    def start_dir(self) -> Path:
        """The Hugging Face directory whose weights the student starts from."""
        named = self.student not in ("auto", "ptq") and (Path(self.student) / "config.json").is_file()
        return Path(self.student) if named else self.model_dir

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
        return parallel.tensor * parallel.pipeline * parallel.context * max(parallel.data, parallel.expert)
