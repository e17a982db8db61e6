"""What the commands share: the ranks' context, the model's description, the data, teachers and students."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from megaqad.config import Settings
from megaqad.data import Datasets, build_datasets, prepare_tokens
from megaqad.distillation.forward import forward_hidden
from megaqad.distillation.teachers import LiveTeacher, Teacher
from megaqad.errors import UserError
from megaqad.evaluation import Evaluator
from megaqad.identity import claim_output_dir
from megaqad.models.build import build_model, transformer_config
from megaqad.models.causal_lm import CausalLM
from megaqad.models.description import ModelDescription, describe_model
from megaqad.models.hf_reader import load_weights
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.choice import chosen_settings, read_choice
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.recipe import Recipe, misfits, recipe_for
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.state import modules_for, refresh_weights, set_mode
from megaqad.runtime.agree import together
from megaqad.runtime.duration import seconds_of
from megaqad.runtime.lock import DirectoryLock
from megaqad.runtime.parallel import ParallelContext, initialize_parallel, join_ranks
from megaqad.runtime.watchdog import Watchdog, enable_flight_recorder
from megaqad.training.checkpoint import latest_checkpoint, load_checkpoint
from megaqad.training.logs import Terminal

LEAST_COLLECTIVE_TIMEOUT_MINUTES = 30.0
"""Before a process group gives up by itself; longer than ``runtime.hang_timeout``, which says more."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Session:
    """One command's run on this rank."""

    settings: Settings
    description: ModelDescription
    context: ParallelContext
    terminal: Terminal
    lock: DirectoryLock | None = None
    """On ``output_dir``, while the session lives; on the main rank of a command that writes there."""

    @classmethod
    def start(cls, settings: Settings, *, command: str | None = None) -> "Session":
        """Join the ranks and lay them out; the settings are checked already.

        Args:
            command: what writes a run: its data are read first, then ``output_dir`` is claimed. None only reads a run.
        """
        patience = seconds_of(settings.runtime.hang_timeout, "runtime.hang_timeout")
        enable_flight_recorder()
        join_ranks(timeout_minutes=max(LEAST_COLLECTIVE_TIMEOUT_MINUTES, 1.5 * patience / 60))
        context = initialize_parallel(settings.sizes, seed=settings.seed)
        description = describe_model(settings.model_dir)
        terminal = Terminal(is_main=context.is_main, watchdog=Watchdog(patience, context.rank))
        session = cls(settings, description, context, terminal)
        if command is not None:
            terminal.say(f"data: {session.data_facts}")
            with together():
                if context.is_main:
                    session.lock = claim_output_dir(command, settings, session.data.train.fingerprint())
            if session.lock is not None and not session.lock.supported:
                terminal.say(f"{settings.run_dir} is on a file system without locks: let no second run use it")
        return session

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.settings.runtime.dtype]

    def recipe_of_settings(self) -> Recipe:
        """What the settings say, before ``quantization.auto`` chooses anything."""
        return self._recipe(self.settings.quantization)

    def _recipe(self, quantization: QuantizationSettings) -> Recipe:
        return recipe_for(quantization, self.description, self.context.sizes.tensor)

    @cached_property
    def recipe(self) -> Recipe:
        """What is quantized; under ``quantization.auto`` only once this run has chosen (``students.settle_recipe``)."""
        quantization = self.settings.quantization
        if quantization.auto is not None:
            quantization = chosen_settings(quantization, read_choice(self.settings.run_dir))
        recipe = self._recipe(quantization)
        kept = misfits(recipe)
        if kept:
            self.terminal.say(f"kept in BF16, because they do not divide into blocks: {', '.join(kept)}")
        return recipe

    @cached_property
    def data(self) -> Datasets:
        """Tokenized by the first rank of each machine while the others wait, then mapped by all."""
        settings = self.settings
        with together():
            if self.context.is_main:
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
        return (
            f"{self.settings.data.source}, {facts.train_tokens:,} training tokens{files}, "
            f"{facts.validation_tokens:,} held out"
        )

    def _build(
        self, recipe: Recipe | None, *, initialize: bool = False, description: ModelDescription | None = None
    ) -> list[CausalLM]:
        description = description or self.description
        config = transformer_config(
            description,
            self.context.sizes,
            dtype=self.dtype,
            recompute=self.settings.train.recompute,
            initialize=initialize,
        )
        if recipe is None:
            return build_model(description, config, self.context)
        return build_model(description, config, self.context, **modules_for(recipe, description))

    def random_model(self) -> list[CausalLM]:
        """A model with random weights and no quantizers."""
        return self._build(None, initialize=True)

    @cached_property
    def teacher(self) -> list[CausalLM]:
        """The original model, frozen."""
        return self.frozen(self.settings.model_dir)

    def frozen(self, model_dir: Path) -> list[CausalLM]:
        """A checkpoint of any supported architecture in this run's layout, frozen."""
        description = describe_model(model_dir)
        chunks = self._build(None, description=description)
        load_weights(chunks, description, model_dir)
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        return chunks

    def original_student(self, recipe: Recipe | None = None) -> list[CausalLM]:
        """The original weights in a model with quantizers, not yet calibrated, quantizers off."""
        chunks = self._build(recipe or self.recipe)
        load_weights(chunks, self.description, self.settings.model_dir)
        return chunks

    def calibrated_student(self, recipe: Recipe | None = None) -> list[CausalLM]:
        """The post-training-quantized student: the original weights, its scales from training data where any are.

        ``recipe`` stands in for the run's own.
        """
        recipe = recipe or self.recipe
        chunks = self.original_student(recipe)
        tokens, counted = self._calibration_tokens() if recipe.needs_data else ([], 0)

        def observe(chunk: CausalLM, number: int) -> None:
            set_mode([chunk], QuantizerMode.CALIBRATE if number < counted else QuantizerMode.OFF)

        data = (lambda: forward_hidden(chunks, tokens, before=observe)) if recipe.needs_data else None
        calibrate(chunks, self.context, data)
        return chunks

    @property
    def calibration_samples(self) -> int:
        """Training sequences to calibrate on: what the recipe asks for, as far as there are so many."""
        return min(self.settings.quantization.calibration_samples, max(1, len(self.data.train)))

    def _calibration_tokens(self) -> tuple[list[torch.Tensor], int]:
        """The first training sequences, divided among the data-parallel ranks, int64 [1, s] each.

        One at a time, so that any number of them is the same sequences in every layout. Also how many of this rank's
        count: the last one may be there only because other ranks have as many.
        """
        samples, ranks, rank = self.calibration_samples, self.context.data_size, self.context.data_rank
        each = -(-samples // ranks)
        batches = self.data.train.micro_batches(
            0, global_batch_size=each * ranks, micro_batch_size=1, data_rank=rank, data_size=ranks
        )
        tokens = [batch.tokens.to(self.context.device) for batch in batches]
        return tokens, len(range(rank, samples, ranks))

    def student_from(self, directory: Path) -> list[CausalLM]:
        """The student of a checkpoint, quantizers on."""
        chunks = self._build(self.recipe)
        load_checkpoint(directory, chunks, self.context)
        refresh_weights(chunks, self.context)
        set_mode(chunks, QuantizerMode.ON)
        return chunks

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
        return Evaluator(
            original or LiveTeacher(self.teacher),
            self.data.validation,
            self.context,
            max_tokens=max_tokens,
            micro_batch_size=self.settings.train.micro_batch_size,
        )

    def with_progress(self, title: str, total: int, work: Callable[[Callable[[], None]], object]) -> object:
        """Run ``work(advance)`` under a progress bar of ``total`` steps."""
        with self.terminal.progress(title, total) as progress:
            return work(lambda: progress.update(progress.task_ids[0], advance=1))
