"""Transformer Engine's part, played on a CPU: linear layers with the calls of Megatron-Core's wrappers, one rank.

Under ``autocast(True)`` a layer rounds its input by the input's own largest value and multiplies with a rounded weight
that it keeps until ``is_first_microbatch`` is set again; backward multiplies with the rounded values. That is what
Transformer Engine's documentation and source say of ``NVFP4BlockScaling`` with the project's settings.
"""

from contextlib import contextmanager

import torch

from megaqad.nvfp4 import fake_quantize
from megaqad.quantization.transformer_engine import layer_on

_ENABLED = [False]


@contextmanager
def autocast(enabled):
    _ENABLED.append(enabled)
    try:
        yield
    finally:
        _ENABLED.pop()


class _Linear(torch.nn.Module):
    def __init__(self, input_size, output_size, *, config, init_method, bias, skip_bias_add, tp_group=None, **_):
        super().__init__()
        assert tp_group.size() == 1
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype)) if bias else None
        if config.perform_initialization:
            init_method(self.weight)
        self.is_first_microbatch = True
        self._kept = None

    def forward(self, x):
        first, self.is_first_microbatch = self.is_first_microbatch, False
        weight = self.weight
        if _ENABLED[-1]:
            if first or self._kept is None:
                self._kept = fake_quantize(weight.detach())
            x = fake_quantize(x)
            weight = self._kept + (weight - weight.detach())
        return torch.nn.functional.linear(x, weight, self.bias), None


def layers():
    """In place of ``transformer_engine_layers``."""
    return {"column": layer_on(_Linear, autocast), "row": layer_on(_Linear, autocast)}
