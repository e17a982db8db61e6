"""What the stages of a recovery share: ranks, the model's description, the data, teachers and students."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.backends.cpu import get_cpu_capability as cpu_capability

from megaqad.config import Settings
from megaqad.data import Datasets, build_datasets, prepare_tokens
from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.teachers import LiveTeacher, Teacher
from megaqad.errors import UserError
from megaqad.evaluation import Evaluator
from megaqad.export.manifest import MANIFEST_FILE
from megaqad.identity import claim_output_dir, identity_of
from megaqad.models.architecture import Architecture
from megaqad.models.build import build_model
from megaqad.models.encodings import Checkpoint
from megaqad.models.families import describe_model
from megaqad.models.hf_files import refuse_occupied
from megaqad.models.load import load_weights
from megaqad.models.model import Model
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.choice import chosen_settings, read_choice
from megaqad.quantization.model import build_quantized, sites, switch
from megaqad.quantization.plan import QuantizationPlan, plan_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.site import QuantizerMode
from megaqad.runtime.agree import on_main, together
from megaqad.runtime.duration import seconds_of
from megaqad.runtime.lock import DirectoryLock
from megaqad.runtime.ranks import Ranks, initialize_parallel, join_ranks, shutdown_parallel
from megaqad.runtime.watchdog import Watchdog, enable_flight_recorder
from megaqad.training.checkpoint import latest_checkpoint, load_checkpoint
from megaqad.training.logs import Terminal

LEAST_COLLECTIVE_TIMEOUT_MINUTES = 30.0
"""Before a process group gives up by itself; longer than ``runtime.hang_timeout``, which says more."""
MOST_NAMED = 8
"""Modules named in a line."""
WITHOUT_BFLOAT16 = ("DEFAULT", "AVX2")
"""PyTorch's names of processors on which a BF16 product takes seven times as long as one of FP32 (2048 x 4096)."""
FEW_TOKENS = 1000
"""Of held-out text: a mean over fewer says little."""
COMMANDS_THAT_EXPORT = ("demo", "recover")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Session:
    """One command's run on this rank."""

    settings: Settings
    architecture: Architecture
    ranks: Ranks
    terminal: Terminal
    lock: DirectoryLock | None = None
    """On ``output_dir``, until ``close``; on the main rank of a command that writes there."""
    command: str = "distill"

    @classmethod
    def start(cls, settings: Settings, *, command: str | None = None) -> "Session":
        """Join the ranks and lay them out; the settings are checked already.

        Args:
            command: what writes a run: its data are read first, then ``output_dir`` is claimed. None only reads a run.
        """
        patience = seconds_of(settings.runtime.hang_timeout, "runtime.hang_timeout")
        enable_flight_recorder()
        join_ranks(timeout_minutes=max(LEAST_COLLECTIVE_TIMEOUT_MINUTES, 1.5 * patience / 60))
        with ExitStack() as undo:
            ranks = initialize_parallel(settings.sizes, seed=settings.seed)
            undo.callback(shutdown_parallel)  # a notebook opens the next session in this process
            terminal = Terminal(is_main=ranks.is_main, watchdog=Watchdog(patience, ranks.rank))
            session = cls(settings, describe_model(settings.model_dir), ranks, terminal)
            if ranks.device.type == "cpu" and session.dtype is torch.bfloat16 and cpu_capability() in WITHOUT_BFLOAT16:
                terminal.say("this processor multiplies FP32 several times faster than BF16: runtime.dtype=float32")
            if command != "pretrain" and not settings.has_random_weights:
                session._say_what_is_read()
            if command is not None:
                session._claim(command)
            undo.pop_all()
        return session

    def _say_what_is_read(self) -> None:
        if not self.ranks.is_main:
            return
        checkpoint = Checkpoint(self.settings.model_dir)
        if checkpoint.note is not None:
            self.terminal.say(f"{self.settings.model_dir}: {checkpoint.note}")
        for kind, count in checkpoint.kinds(self.architecture.tensors).items():
            self.terminal.say(
                f"{count} tensors of the model are stored in {kind}: read as the BF16 values they stand for"
            )

    def _claim(self, command: str) -> None:
        """Read the data of a run that is written, and take its ``output_dir``."""
        self.command = command
        self.terminal.say(f"data: {self.data_facts}")
        self._say_what_is_compared()
        identity = self.identity
        with together():
            if self.ranks.is_main:
                if command in COMMANDS_THAT_EXPORT:  # not only after training
                    refuse_occupied(self.settings.run_dir / "export", MANIFEST_FILE)
                self.lock = claim_output_dir(command, self.settings, identity)
        if self.lock is not None and not self.lock.supported:
            self.terminal.say(f"{self.settings.run_dir} is on a file system without locks: let no second run use it")

    def _say_what_is_compared(self) -> None:
        """Of a teacher with other ids than the student; refused where the data hold one that it lacks."""
        teacher_dir, ids = self.settings.teacher_dir, self.architecture.vocab_size
        theirs = self.described(teacher_dir).vocab_size
        if theirs == ids:
            return
        if self.data.facts.largest_token >= theirs:
            raise UserError(
                f"the data hold token {self.data.facts.largest_token}, which distill.teacher={teacher_dir} with "
                f"vocab_size={theirs} does not know: choose a teacher with the student's tokens"
            )
        self.terminal.say(
            f"the teacher has {theirs} ids and the student {ids}: the distributions over the {min(ids, theirs)} that "
            "both have are compared"
        )

    def close(self) -> None:
        """Let another run have ``output_dir`` and the process its ranks; the end of the process does the same."""
        if self.lock is not None:
            self.lock.release()
        shutdown_parallel()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed, the training tokens themselves included.

        Collective: one broadcast, because reading the model and hashing the tokens is work for one rank.
        """
        return on_main(
            lambda: {
                **identity_of(self.command, self.settings),
                "data.tokens": self.data.train.fingerprint(),
            }
        )

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.runtime.dtype]

    def plan_of_settings(self) -> QuantizationPlan:
        """What the settings say, before ``quantization.auto`` chooses anything."""
        return self._plan(self.settings.quantization)

    def _plan(self, quantization: QuantizationSettings) -> QuantizationPlan:
        return plan_for(quantization, self.architecture, self.ranks.sizes.tensor)

    @cached_property
    def plan(self) -> QuantizationPlan:
        """What is quantized; under ``quantization.auto`` only once this run has chosen (``students.settle_recipe``)."""
        quantization = self.settings.quantization
        if quantization.auto is not None:
            quantization = chosen_settings(quantization, read_choice(self.settings.run_dir))
        plan = self._plan(quantization)
        if plan.misfits:
            self.terminal.say(f"kept in BF16, because they do not divide into blocks: {', '.join(plan.misfits)}")
        if plan.note is not None:
            self.terminal.say(plan.note)
        return plan

    @cached_property
    def data(self) -> Datasets:
        """Tokenized by the first rank of each machine while the others wait, then mapped by all."""
        settings = self.settings
        with together():
            if self.ranks.is_main:
                prepare_tokens(settings.data, model_dir=settings.model_dir)
        return build_datasets(
            settings.data,
            model_dir=settings.model_dir,
            sequence_length=settings.train.sequence_length,
            seed=settings.seed,
        )

    @property
    def data_facts(self) -> str:
        """One line on the data, for the terminal and the report."""
        facts = self.data.facts
        files = f" of {facts.train_files} files" if facts.train_files else ""
        begins = f"; every document begins with {facts.beginning}" if facts.beginning else ""
        endings = Counter(path.suffix.lower() or path.name for path in self.data.left_out)
        named = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(MOST_NAMED))
        return (
            f"{self.settings.data.source}, {facts.train_tokens:,} training tokens{files}, "
            f"{facts.validation_tokens:,} held out{begins}{named and f'; files left out, no text: {named}'}"
        )

    def random_model(self) -> Model:
        """A model with random weights and no quantizers."""
        return build_model(self.architecture, self.ranks, initialize=True, **self._of_training)

    @cached_property
    def teacher(self) -> Model:
        """The original model, frozen."""
        return self.frozen(self.settings.model_dir)

    def described(self, model_dir: Path) -> Architecture:
        """A checkpoint of any supported architecture as the teacher of a student of ``model``."""
        if model_dir == self.settings.model_dir:
            return self.architecture
        return describe_model(model_dir).teaching(self.architecture.vocab_size)

    def frozen(self, model_dir: Path) -> Model:
        """The same with its weights, in this run's layout."""
        random, fused = self.settings.has_random_weights, self.settings.runtime.fused
        architecture = self.described(model_dir)
        model = build_model(architecture, self.ranks, dtype=self.dtype, fused=fused, initialize=random)
        return self.with_weights(model, model_dir).freeze()

    def with_weights(self, model: Model, model_dir: Path) -> Model:
        """The model with those of a checkpoint, or with the random ones that it was built with."""
        if not self.settings.has_random_weights:
            load_weights(model, model_dir)
        return model

    def _empty_student(self, plan: QuantizationPlan) -> Model:
        random = self.settings.has_random_weights
        return build_quantized(self.architecture, self.ranks, plan, initialize=random, **self._of_training)

    @property
    def _of_training(self) -> dict[str, Any]:
        """How a model that is trained computes."""
        settings = self.settings
        return {"dtype": self.dtype, "recompute": settings.train.recompute, "fused": settings.runtime.fused}

    def original_student(self, plan: QuantizationPlan | None = None) -> Model:
        """The weights that the run starts from in a model with quantizers, not yet calibrated, quantizers off."""
        return self.with_weights(self._empty_student(plan or self.plan), self.settings.start_dir)

    def calibrated_student(self, plan: QuantizationPlan | None = None) -> Model:
        """The post-training-quantized student: the weights that the run starts from, scales from training data where
        any are.

        ``plan`` stands in for the run's own.
        """
        plan = plan or self.plan
        student = self.original_student(plan)
        tokens, counted = self._calibration_tokens() if plan.needs_data else ([], 0)

        def observe(number: int) -> None:
            for site in sites(student):
                site.mode = QuantizerMode.CALIBRATE if number < counted else QuantizerMode.OFF

        silent = calibrate(student, (lambda: forward_hidden(student, tokens, before=observe)) if tokens else None)
        if silent:
            shown = ", ".join(silent[:MOST_NAMED]) + (
                f" and {len(silent) - MOST_NAMED} more" if silent[MOST_NAMED:] else ""
            )
            self.terminal.say(f"saw only zeros in calibration, so they take their layer's scale or 1: {shown}")
        return student

    @property
    def calibration_samples(self) -> int:
        """Training sequences to calibrate on: what the recipe asks for, as far as there are so many."""
        return min(self.settings.quantization.calibration_samples, max(1, len(self.data.train)))

    def _calibration_tokens(self) -> tuple[list[torch.Tensor], int]:
        """The first training sequences, divided among the data-parallel ranks, int64 [1, s] each.

        One at a time, so that any number of them is the same sequences in every layout. Also how many of this rank's
        count: the last one may be there only because other ranks have as many.
        """
        samples, ranks, rank = self.calibration_samples, self.ranks.data_size, self.ranks.data_rank
        each = -(-samples // ranks)
        batches = self.data.train.micro_batches(
            0, global_batch_size=each * ranks, micro_batch_size=1, data_rank=rank, data_size=ranks
        )
        tokens = [batch.tokens.to(self.ranks.device) for batch in batches]
        return tokens, len(range(rank, samples, ranks))

    def student_from(self, directory: Path) -> Model:
        """The student of a checkpoint, quantizers on; of a Hugging Face directory, calibrated."""
        if directory == self.settings.start_dir:
            return self.calibrated_student()
        student = self._empty_student(self.plan)
        load_checkpoint(directory, student)
        switch(student, QuantizerMode.ON)
        return student

    def chosen_student(self) -> Path:
        """The checkpoint that ``student=`` names.

        Raises:
            UserError: there is none.
        """
        settings = self.settings
        if settings.student not in ("auto", "ptq"):
            return Path(settings.student)
        newest = latest_checkpoint(settings.run_dir) if settings.student == "auto" else None
        if newest is not None:
            return newest
        if (settings.run_dir / "ptq" / "state.json").is_file():
            return settings.run_dir / "ptq"
        raise UserError(f"{settings.run_dir} holds no student: run `megaqad quantize` or `megaqad distill` there first")

    def evaluator(self, max_tokens: int, original: Teacher | None = None) -> Evaluator:
        """Against the original model, on the first ``max_tokens`` held-out tokens.

        ``original``: what computes it already; None loads it.
        """
        held_out = len(self.data.validation.tokens) - 1
        tokens = min(max_tokens, held_out) if max_tokens else held_out
        if tokens < FEW_TOKENS:
            self.terminal.say(f"held-out numbers are means over {tokens} tokens, which say little: give more text")
        return Evaluator(
            original or LiveTeacher(self.teacher),
            self.data.validation,
            max_tokens=max_tokens,
            micro_batch_size=self.settings.train.micro_batch_size,
        )

    def with_progress(self, title: str, total: int, work: Callable[[Callable[[], None]], object]) -> object:
        """Run ``work(advance)`` under a progress bar of ``total`` steps."""
        with self.terminal.progress(title, total) as progress:
            return work(lambda: progress.update(progress.task_ids[0], advance=1))
