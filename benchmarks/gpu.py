"""What a GPU must show, in one call: ``python -m benchmarks.gpu``, about four minutes.

JSON lines as they are measured, then a table of the bars with what was found beside each; exit code 1 where one is
missed. Each part runs in a process of its own and is named if it fails, so that one of them does not cost the others.
That the results are right is ``pytest tests/gpu``.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

STEP = (
    *("model=random:llama-1b", "data=random", "runtime.dtype=bfloat16", "quantization=nvfp4", "parallel.data=1"),
    *("train.sequence_length=4096", "train.global_batch_size=8", "train.micro_batch_size=2"),
    *("quantization.calibration_samples=4", "evaluation.max_tokens=8192", "data.max_train_tokens=200000"),
)
MEGAQAD = (sys.executable, "-m", "megaqad")
PARTS: Mapping[str, tuple[str, ...]] = {
    "step": (*MEGAQAD, "bench", "step", *STEP, "--profile"),
    "plain step": (*MEGAQAD, "bench", "step", *STEP, "runtime.fused=plain"),
    "kl": (sys.executable, "-m", "benchmarks.gpu", "kl"),
    "numbers": (sys.executable, "-m", "benchmarks.gpu", "numbers"),
}
MINUTES = 4
"""Of one part."""


@dataclass(frozen=True)
class Bar:
    """One number of one row, and what it must be."""

    part: str
    what: str
    of: Mapping[str, Any]
    """Values by which the row is known."""
    value: Callable[[Row], float]
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


WHOLE = {"part": "step"}
HEADS = {"operation": "heads", "impl": "megaqad", "ignored": 0.0}
LOGITS = {"operation": "logits", "impl": "megaqad", "vocabulary": 32000}
FAKE = {"operation": "fake_quantize", "amax": "given", "impl": "triton"}
BARS = (
    Bar("step", "QAD step, ModelOpt's seconds over ours", WHOLE, lambda row: row["modelopt_over_qad"], least=1.35),
    Bar(
        "step",
        "fine-tuning, transformers' time over ours",
        WHOLE,
        lambda row: row["hugging_face_over_plain"],
        least=1,
    ),
    Bar("step", "QAD step, TFLOP/s (H200)", WHOLE, lambda row: row["qad_tflops"], least=500),
    Bar("step", "QAD step over fine-tuning step", WHOLE, lambda row: row["ratio"], most=1.40),
    Bar("step", "QAD step, GB beyond what is held", WHOLE, lambda row: row["qad_peak_tensor_bytes"] / 1e9, most=13.1),
    *(
        Bar(
            "kl",
            f"heads over their products, hidden {hidden}",
            HEADS | {"hidden": hidden},
            lambda row: row["ratio_to_products"],
            most=most,
        )
        for hidden, most in ((4096, 1.10), (2048, 1.20))
    ),
    Bar("kl", "KL of logits, share of copy bandwidth", LOGITS, lambda row: row["of_copy"], least=0.85),
    Bar(
        "numbers",
        "fake_quantize over a copy, 4096 x 4096",
        FAKE | {"shape": [4096, 4096]},
        lambda row: 1 / row["of_copy"],
        most=1.5,
    ),
    Bar(
        "numbers",
        "fake_quantize, share of copy bandwidth, 16384 x 16384",
        FAKE | {"shape": [16384, 16384]},
        lambda row: row["of_copy"],
        least=0.80,
    ),
)


def kl_rows() -> Iterator[dict[str, Any]]:
    """KL of given logits, with how fast a copy would have moved their bytes, and of heads."""
    import torch

    from .kl import bench_kl
    from .measure import in_turns, seconds_of

    tokens, vocabulary = 8192, 32_000
    device = torch.device("cuda")
    source = torch.empty(tokens, vocabulary, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = min(in_turns({"copy": lambda: seconds_of(lambda: target.copy_(source), device)}, 10)["copy"])
    bandwidth = 2 * source.nbytes / copied
    heads = ((8192, 151_936, 4096), (8192, 128_256, 2048))
    for row in bench_kl(logits_shapes=[(tokens, vocabulary)], head_shapes=heads):
        of_logits = (row["operation"], row.get("impl")) == ("logits", "megaqad")
        moved = 10 * tokens * vocabulary  # both logits twice, the gradient once, in BF16
        yield row | ({"of_copy": moved / row["seconds"] / bandwidth} if of_logits else {})


def number_rows() -> Iterator[dict[str, Any]]:
    from .nvfp4 import bench_nvfp4

    yield from bench_nvfp4(shapes=((16384, 16384), (4096, 4096)))


def rows_of(command: Sequence[str]) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON lines that a part prints, and how it failed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60 * MINUTES, check=False)
        output, problem = done.stdout, f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as late:
        output, problem = (late.stdout or b"").decode(), f"no end after {MINUTES} minutes"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], problem


def verdict(bar: Bar, rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether a bar is met, and the line that says so."""
    limit = f"at most {bar.most:g}" if bar.most is not None else f"at least {bar.least:g}"
    for row in rows:
        if all(row.get(key) == value for key, value in bar.of.items()):
            try:
                value = bar.value(row)
            except KeyError as missing:
                return False, f"missed  {bar.what}: not measured ({missing.args[0]}), {limit}"
            return bar.met(value), f"{'met   ' if bar.met(value) else 'missed'}  {bar.what}: {value:.3g}, {limit}"
    return False, f"missed  {bar.what}: not measured, {limit}"


def main() -> int:
    own = {"kl": kl_rows, "numbers": number_rows}
    if sys.argv[1:]:
        for row in own[sys.argv[1]]():
            print(json.dumps(row), flush=True)
        return 0
    lines, missed = [], 0
    for part, command in PARTS.items():
        rows, problem = rows_of(command)
        for row in rows:
            print(json.dumps({"of": part} | row), flush=True)
        if problem is not None:
            lines.append(f"failed  {part}: {problem}")
        for bar in BARS:
            if bar.part == part:
                met, line = verdict(bar, rows)
                lines.append(line)
                missed += not met
    print("\n".join(lines))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
