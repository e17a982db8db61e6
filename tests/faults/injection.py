"""Faults that a rank applies to itself, for tests: installed by ``tests.forked`` before the command begins.

Nothing of this is in the product. A fault replaces a function by one that counts its calls and, at the chosen call on
the chosen rank, kills the process, raises what the system would raise, waits for ever, or spoils a number.
"""

import errno
import functools
import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

POINTS = {
    "data": "megaqad.data.dataset:TokenDataset.micro_batches",
    "teacher forward": "megaqad.distillation.teachers:forward_hidden",
    "student forward": "megaqad.distillation.step:linear_divergence",
    "backward": "megaqad.distillation.finite:_adder",
    "gradient reduction": "megaqad.distillation.step:finalize_model_grads",
    "optimizer": "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads",
    "weights quantized": "megaqad.quantization.model:refresh",
    "validation": "megaqad.evaluation.evaluate:Evaluator.evaluate",
    "log": "megaqad.training.logs:MetricsLog.write",
    "copy to host": "megaqad.training.saver:to_host",
    "checkpoint write": "megaqad.runtime.files:_blocks",
    "read back": "megaqad.training.saver:digest_of",
    "state": "megaqad.training.saver:state_text",
    "manifest": "megaqad.training.saver:write_manifest",
    "rename": "megaqad.training.saver:_put_in_place",
    "latest": "megaqad.training.run:mark_latest",
    "removal of old ones": "megaqad.training.run:remove_surplus",
}
"""Moments of a step and of a save, by the function that is at work then."""
CALLS = {
    "data": 8,
    "teacher forward": 8,
    "student forward": 32,
    "backward": 500,
    "gradient reduction": 8,
    "optimizer": 8,
    "weights quantized": 8,
    "validation": 2,
    "log": 8,
    "copy to host": 9,
    "checkpoint write": 100,
    "read back": 9,
    "state": 5,
    "manifest": 5,
    "rename": 5,
    "latest": 4,
    "removal of old ones": 4,
}
"""Calls that the run of ``runs.py`` surely makes on each rank concerned."""
ON_MAIN_RANK_ONLY = ("log", "state", "manifest", "rename", "latest", "removal of old ones")
FACTORIES = ("backward",)
"""Points whose function makes the function that is called."""
GENERATORS = ("checkpoint write",)
"""Points where a call is one block of a file: the fault strikes inside the file."""
HANGS = "this rank hangs from now on"


def _this_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _replace(target: str, make: Callable[[Any], Any]) -> None:
    module_name, path = target.split(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = vars(owner)[parent]
    setattr(owner, name, make(vars(owner)[name]))


def _at_call(point: str, call: int, rank: int, action: Callable[[], None], *, after: bool) -> None:
    """Do ``action`` at the ``call``-th call (from 1) of a point's function on a rank."""
    if rank != _this_rank():
        return
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == call:
            action()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not after:
                tick()
            result = function(*args, **kwargs)
            if after:
                tick()
            return result

        return wrapped

    def counted_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for block in function(*args, **kwargs):
                tick()
                yield block

        return wrapped

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        if point in GENERATORS:
            return counted_blocks(function)
        if point in FACTORIES:
            return lambda *args: counted(function(*args))
        return counted(function)

    _replace(POINTS[point], make)


def kill(point: str, call: int, rank: int, after: bool = False) -> None:
    """SIGKILL, as the kernel's out-of-memory killer does it."""
    _at_call(point, call, rank, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)


def fail(point: str, call: int, rank: int, error: str = "ENOSPC") -> None:
    """The system's answer to a write: ENOSPC (disk full), EROFS (read-only), EIO (broken)."""

    def refuse() -> None:
        number = vars(errno)[error]
        raise OSError(number, os.strerror(number))

    _at_call(point, call, rank, refuse, after=False)


def fail_log(call: int, error: str) -> None:
    """The same answer to the ``call``-th row of metrics.jsonl."""
    from megaqad.training.logs import MetricsLog

    write = MetricsLog.write
    count = 0

    class Refusing:
        def write(self, _text: str) -> None:
            number = vars(errno)[error]
            raise OSError(number, os.strerror(number))

        def close(self) -> None:
            pass

    def counted(self: Any, row: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == call and self._file is not None:
            self._file.close()
            self._file = Refusing()
        write(self, row)

    MetricsLog.write = counted


def crash(point: str, call: int, rank: int) -> None:
    """A defect: an exception nobody expects."""

    def raise_defect() -> None:
        raise RuntimeError(f"injected defect in {point}")

    _at_call(point, call, rank, raise_defect, after=False)


def hang(point: str, call: int, rank: int) -> None:
    """One rank never comes to the next collective; it says so, for a test that must not be early."""

    def stay_away() -> None:
        os.write(2, f"{HANGS}\n".encode())
        time.sleep(3600)

    _at_call(point, call, rank, stay_away, after=False)


def slow(point: str, seconds: float) -> None:
    """Every call takes longer on every rank, so that a signal from outside hits a known phase."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return wrapped

    _replace(POINTS[point], make)


def clock_goes_back(seconds_per_call: float) -> None:
    """Wall-clock time runs backwards; the monotonic clock does not, that is what it is for."""
    start = time.time()
    calls = 0

    def backwards() -> float:
        nonlocal calls
        calls += 1
        return start - calls * seconds_per_call

    time.time = backwards
    time.time_ns = lambda: int(backwards() * 1e9)


LOAD = "megaqad.recovery.session:load_weights"


def spoiled_embedding(load: Callable[..., Any], folder: str, token: int) -> Callable[..., Any]:
    """``load_weights`` after which a token of the model in ``folder`` is NaN; a checkpoint that holds it is refused."""

    @functools.wraps(load)
    def wrapped(model: Any, model_dir: Any) -> Any:
        read = load(model, model_dir)
        for held in model.held:
            part = held.weight.parts[0]
            if str(model_dir) == folder and part.name == "model.embed_tokens.weight":
                (start, stop), _ = part.box(model.ranks.tensor_rank, model.ranks.sizes.tensor)
                if start <= token < stop:
                    held.data[token - start, 3] = float("nan")
        return read

    return wrapped


def nan_in_teacher(folder: str, token: int) -> None:
    """One number in the embedding of the teacher in ``folder`` is NaN."""
    _replace(LOAD, lambda load: spoiled_embedding(load, folder, token))


def nan_in_data(first_sample: int, micro_batch: int, data_rank: int) -> None:
    """A token weight of one microbatch of the step that begins at ``first_sample`` is NaN."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(self: Any, consumed_samples: int, **kwargs: Any) -> Any:
            batches = function(self, consumed_samples, **kwargs)
            # The calibration reads from sample 0 in a global batch of its own.
            if consumed_samples == first_sample and kwargs["data_rank"] == data_rank:
                batches[micro_batch].weights[0, 0] = float("nan")
            return batches

        return wrapped

    _replace(POINTS["data"], make)


def nan_in_gradient(
    step: int, micro_batch: int, rank: int, parameter: str = "layers.1.mlp.block.linear_fc2.weight"
) -> None:
    """One element of one parameter's gradient is NaN in one microbatch of one step, counted by the run's schedule."""
    if rank != _this_rank():
        return
    from megaqad.distillation.step import DistillationStep

    start, call = DistillationStep.__init__, DistillationStep.__call__
    at = {"step": 0, "micro_batch": 0}

    def spoil(gradient: Any) -> Any:
        hit = at["step"] == step and at["micro_batch"] == micro_batch
        at["micro_batch"] += 1
        if not hit:
            return None
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = float("nan")
        return spoiled

    def __init__(self: Any, model: Any, student: Any, *args: Any, **kwargs: Any) -> None:
        for chunk in student:
            for name, value in chunk.named_parameters():
                if name.endswith(parameter):
                    value.register_hook(spoil)
        start(self, model, student, *args, **kwargs)

    def __call__(self: Any, micro_batches: Any) -> Any:
        at["step"], at["micro_batch"] = self.scheduler.num_steps + 1, 0
        return call(self, micro_batches)

    vars_of = {"__init__": __init__, "__call__": __call__}
    for name, function in vars_of.items():
        setattr(DistillationStep, name, function)


def loss_spike(consumed_samples: int, factor: float) -> None:
    """The loss of the step that begins at these samples is reported larger than it was."""
    from megaqad.training import loop

    take = loop.Loop._micro_batches
    seen = {"samples": -1}

    def remember(self: Any, samples: int) -> Any:
        seen["samples"] = samples
        return take(self, samples)

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(self: Any, *args: Any) -> Any:
            loss = function(self, *args)
            return loss * factor if seen["samples"] == consumed_samples else loss

        return wrapped

    loop.Loop._micro_batches = remember
    _replace("megaqad.distillation.step:DistillationStep._mean", make)
