"""How fast the NVFP4 implementations are, beside the plain reference, ModelOpt and a copy of the same bytes.

Before anything is timed, all contestants must agree in every bit.

``of_copy`` is the bandwidth in bytes that the operation must read and write, as a fraction of that of copying a tensor
in the same rounds. An operation that finds its own amax is counted as reading its input twice.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaqad.nvfp4 import (
    Impl,
    NVFP4Tensor,
    dequantize,
    fake_quantize,
    fake_quantize_packed,
    native,
    quantize,
    row_amax,
    tensor_amax,
)

from .measure import default_device, in_turns, machine, seconds_of

_CALLS_PER_ROUND_ON_CUDA = 20  # one launch is too short for an event pair
_FILLS_ON_CUDA, _FILLED_BYTES = 16, 1 << 30  # a few milliseconds, and no input is left in the cache
_SHAPES = {"cpu": ((4096, 4096), (4096, 192)), "cuda": ((16384, 16384), (4096, 4096), (4096, 192))}

Contestants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class _Operation:
    name: str
    amax: str
    """``own``: found in the input on every call. ``rows``: each row's own. ``given``: known beforehand. ``none``: not
    needed."""
    bytes_moved: int
    contestants: Contestants


def bench_nvfp4(
    shapes: Sequence[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Time every implementation of every operation; one JSON-able dict per measurement, as it is made.

    Args:
        shapes: of the inputs, ``[rows, K]``; by default a weight and a small activation, on CUDA also a tensor that no
            cache holds.
        dtype: of the inputs.
        device: where to run; CUDA when there is one.
        repeats: rounds, of which the median is reported.
        seed: of the random inputs, normal with standard deviation 0.02.

    Yields:
        ``operation``, ``amax`` (``own``, ``rows``, ``given`` or ``none``), ``impl``, ``shape``, ``dtype``, ``device``,
        ``threads``, ``allocator``, ``repeats``, ``seconds`` (median), ``seconds_min``, ``gigabytes_per_second``,
        and the ratios ``speedup_over_reference``, ``speedup_over_modelopt`` (null where ModelOpt has no such one),
        ``of_copy``.

    Raises:
        ValueError: ``repeats`` is below 1, or as ``quantize`` for the shapes and the dtype.
        AssertionError: two contestants differ in a bit.
    """
    where = torch.device(device or default_device())
    generator = torch.Generator().manual_seed(seed)
    for shape in shapes or _SHAPES[where.type]:
        x = (torch.randn(shape, generator=generator) * 0.02).to(where, dtype)
        for operation in _operations(x):
            _check_agreement(operation)
            yield from _measure(operation, x, repeats)


def _operations(x: Tensor) -> Iterator[_Operation]:
    impls: list[Impl] = ["reference", "torch"]
    if x.is_cuda:
        impls.append("triton")
    elif native.unavailable() is None:
        impls.append("native")
    given = tensor_amax(x)
    q = quantize(x)
    whole, packed = x.nbytes, q.nbytes

    def ours(function: Callable[..., object], *arguments: object) -> Contestants:
        return {impl: partial(function, *arguments, impl=impl) for impl in impls}

    def modelopt(function: Callable[..., object], *arguments: object) -> Contestants:
        return {"modelopt": partial(function, *arguments)}

    yield _Operation(
        "fake_quantize", "own", 3 * whole, ours(fake_quantize, x) | modelopt(_modelopt_round_trip, x, None)
    )
    yield _Operation(
        "fake_quantize",
        "given",
        2 * whole,
        ours(fake_quantize, x, given) | modelopt(_modelopt_round_trip, x, q.global_scale),
    )
    yield _Operation("fake_quantize", "rows", 3 * whole, ours(_fake_quantize_rows, x))
    yield _Operation("quantize", "own", 2 * whole + packed, ours(quantize, x) | modelopt(_modelopt_quantize, x, None))
    yield _Operation("fake_quantize_packed", "given", 2 * whole + packed, ours(fake_quantize_packed, x, given))
    yield _Operation(
        "dequantize", "none", packed + whole, ours(dequantize, q, x.dtype) | modelopt(_modelopt_dequantize, q, x.dtype)
    )


def _fake_quantize_rows(x: Tensor, impl: Impl) -> Tensor:
    return fake_quantize(x, row_amax(x, impl=impl), impl=impl)


def _modelopt_quantize(x: Tensor, global_scale: Tensor | None) -> NVFP4Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    q, scales, s2 = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=global_scale)
    return NVFP4Tensor(q._quantized_data, scales, s2)


def _modelopt_dequantize(q: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensor = NVFP4QTensor(q.shape, dtype, q.codes)
    return tensor.dequantize(dtype=dtype, scale=q.block_scales, double_scale=q.global_scale, block_sizes={-1: 16})


def _modelopt_round_trip(x: Tensor, global_scale: Tensor | None) -> Tensor:
    return _modelopt_dequantize(_modelopt_quantize(x, global_scale), x.dtype)


def _check_agreement(operation: _Operation) -> None:
    """Run every contestant once, which also warms it up, and compare its outputs with the reference's.

    On CUDA not with ModelOpt's own global scale: it multiplies by a rounded 1 / 2688 there and may be one ulp off.
    """
    outputs = {name: _tensors(run()) for name, run in operation.contestants.items()}
    expected = outputs["reference"]
    for name, tensors in outputs.items():
        if name == "modelopt" and operation.amax == "own" and tensors[0].is_cuda:
            continue
        for a, b in zip(tensors, expected, strict=True):
            same = torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
            assert same, f"{operation.name}: {name} and reference differ"


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, NVFP4Tensor):
        return [output.codes, output.block_scales, output.global_scale]
    assert isinstance(output, tuple)
    return [tensor for part in output for tensor in _tensors(part)]


def _measure(operation: _Operation, x: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    target = torch.empty_like(x)
    contestants: Contestants = {"copy": lambda: target.copy_(x), **operation.contestants}
    timed = {name: partial(_seconds, run, x.device) for name, run in contestants.items()}
    seconds = in_turns(timed, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    copy_bandwidth = 2 * x.nbytes / medians["copy"]
    for name in operation.contestants:
        bandwidth = operation.bytes_moved / medians[name]
        modelopt = medians.get("modelopt")
        yield {
            "bench": "nvfp4",
            "operation": operation.name,
            "amax": operation.amax,
            "impl": name,
            "shape": list(x.shape),
            "dtype": str(x.dtype).removeprefix("torch."),
            **machine(x.device),
            "repeats": repeats,
            "seconds": medians[name],
            "seconds_min": min(seconds[name]),
            "speedup_over_reference": medians["reference"] / medians[name],
            "speedup_over_modelopt": None if modelopt is None else modelopt / medians[name],
            "gigabytes_per_second": bandwidth / 1e9,
            "of_copy": bandwidth / copy_bandwidth,
        }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call; on CUDA the device's, of one of many calls launched together."""
    if device.type != "cuda":
        return seconds_of(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    for _ in range(_FILLS_ON_CUDA):  # busy while the calls are launched: what is timed is the device, not the launches
        torch.empty(_FILLED_BYTES, dtype=torch.uint8, device=device).zero_()
    begin.record()
    for _ in range(_CALLS_PER_ROUND_ON_CUDA):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _CALLS_PER_ROUND_ON_CUDA
