"""Whether Transformer Engine's NVFP4 layers are the emulated ones, and how fast they are: on a GPU that has NVFP4.

Each check is a row with what was found, what it may be, and whether it passed. The two layers hold the same BF16 weight
and are calibrated on the same inputs. They may differ by ties, which the engine's reciprocal form rounds otherwise: a
few codes in a thousand, by one step, where rounding to NVFP4 itself moves a result by a tenth.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from megaqad.models.model import Model
from megaqad.models.weights import COLUMN, ROW, HfTensor, Weight
from megaqad.quantization import transformer_engine
from megaqad.quantization.backend import check_backend
from megaqad.quantization.calibrate import calibrate
from megaqad.quantization.formats import LinearFormat
from megaqad.quantization.layers import NVFP4ColumnParallelLinear, NVFP4RowParallelLinear
from megaqad.quantization.settings import QuantizationSettings
from megaqad.runtime.ranks import ParallelSizes, Ranks, join_ranks, leave_ranks, parallel

from .measure import in_turns, machine, seconds_of

EMULATED: dict[str, type] = {"column": NVFP4ColumnParallelLinear, "row": NVFP4RowParallelLinear}
MOST_ON, MOST_OFF = 0.01, 1e-3
"""Relative distance of the two layers, quantizers on and off."""
SHAPES = ((8192, 4096, 4096), (8192, 4096, 12288), (8192, 12288, 4096))
"""Tokens, inputs and outputs that are timed: those of an 8B model."""
SMALL = (128, 256, 384)


def rows() -> Iterator[dict[str, Any]]:
    """Of ``megaqad bench blackwell``.

    Raises:
        UserError: a GPU without NVFP4, or no Transformer Engine that says what backward multiplies with.
    """
    check_backend(QuantizationSettings(backend="transformer_engine"), "bfloat16")
    join_ranks()
    with parallel(ParallelSizes()) as ranks:
        yield from measured(ranks)
    leave_ranks()


def measured(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """All checks, then the speeds, then how many checks failed."""
    common = {"bench": "blackwell", **machine(ranks.device)}
    failed = 0
    for kind in EMULATED:
        for row in checks(kind, ranks):
            failed += not row["passed"]
            yield common | row
    for shape in SHAPES:
        yield from (common | row for row in speeds(shape, ranks))
    yield common | {"check": "all", "failed": failed, "passed": failed == 0}


def pair(kind: str, ranks: Ranks, inputs: int, outputs: int) -> dict[str, Any]:
    """Both layers with the same weight, by name."""
    from megatron.core.transformer import TransformerConfig

    split = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    config = TransformerConfig(
        num_layers=1, hidden_size=inputs, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16
    )
    cut = COLUMN if kind == "column" else ROW
    classes = {"transformer_engine": transformer_engine.transformer_engine_layers()[kind], "emulated": EMULATED[kind]}
    made = {
        name: layer(
            inputs,
            outputs,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=ranks.tensor_group,
            held=Weight("weight", (HfTensor("layer.weight", (outputs, inputs), cut),)),
            observes=(ranks.tensor_group, ranks.data_group),
            quantization=LinearFormat("nvfp4", "nvfp4"),
            **split,
        )
        for name, layer in classes.items()
    }
    weight = _drawn(0, outputs, inputs, device=ranks.device) * 0.02
    with torch.no_grad():
        for layer in made.values():
            layer.weight.copy_(weight)
    return made


def checks(kind: str, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Quantizers off, on, backward, and what the export would hold."""
    tokens, inputs, outputs = SMALL
    x = _drawn(1, tokens, 2, inputs, device=ranks.device).clamp(-3, 3)
    x[0, 0, 0] = 3.0  # the largest: the scale that calibration finds is the engine's own of this input
    slope = _drawn(2, tokens, 2, outputs, device=ranks.device)
    layers = pair(kind, ranks, inputs, outputs)
    off = {name: layer(x)[0].detach() for name, layer in layers.items()}
    yield _check("output, quantizers off", kind, _distance(off), MOST_OFF)
    found: dict[str, dict[str, Tensor]] = {"output": {}, "gradient of inputs": {}, "gradient of the weight": {}}
    for name, layer in layers.items():
        leaf = x.clone().requires_grad_()
        _calibrate(layer, x, ranks)
        output, _ = layer(leaf)
        output.backward(slope)
        for what, tensor in zip(found, (output.detach(), leaf.grad, layer.weight.grad), strict=True):
            found[what][name] = tensor
    for what, tensors in found.items():
        yield _check(what, kind, _distance(tensors), MOST_ON)
    exported = {name: layer.quantized_weight for name, layer in layers.items()}
    yield _check("weight that is exported", kind, _distance(exported), 0.0)


def speeds(shape: tuple[int, int, int], ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Forward and backward of a column-parallel layer, beside the same in BF16."""
    tokens, inputs, outputs = shape
    layers = pair("column", ranks, inputs, outputs)
    x = _drawn(1, tokens, 1, inputs, device=ranks.device)
    slope = _drawn(2, tokens, 1, outputs, device=ranks.device)
    passes = {name: partial(seconds_of, _pass(layer, x, slope), ranks.device) for name, layer in layers.items()}
    timed = in_turns({"bf16": passes["emulated"]}, 5)  # quantizers are still off
    for layer in layers.values():
        _calibrate(layer, x, ranks)
    timed |= in_turns(passes, 5)
    for name, seconds in timed.items():
        spent = statistics.median(seconds)
        yield {
            "speed": name,
            **{"tokens": tokens, "inputs": inputs, "outputs": outputs},
            "seconds": spent,
            "tflops": 6.0 * tokens * inputs * outputs / spent / 1e12,
        }


def _calibrate(layer: Any, x: Tensor, ranks: Ranks) -> None:
    """Scales from ``x``, quantizers on; a model of this one layer, of which nothing else is asked."""
    model = cast(Any, Model)(None, [layer], ranks)
    calibrate(model, lambda: layer(x))


def _pass(layer: Any, x: Tensor, slope: Tensor) -> Callable[[], object]:
    def run() -> None:
        leaf = x.clone().requires_grad_()
        layer(leaf)[0].backward(slope)

    return run


def _drawn(seed: int, *shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def _distance(tensors: dict[str, Tensor]) -> float:
    """Of the engine's from the emulated one's, relative."""
    ours, theirs = tensors["transformer_engine"].double(), tensors["emulated"].double()
    return float((ours - theirs).norm() / theirs.norm())


def _check(what: str, kind: str, found: float, most: float) -> dict[str, Any]:
    return {"check": what, "layer": kind, "found": found, "most": most, "passed": found <= most}
