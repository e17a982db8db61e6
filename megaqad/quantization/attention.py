"""The KV cache as the engine keeps it: attention on keys and values that went through a number format.

Keys are rounded after the rotary embedding and the head norm, values as the projection made them: that is when an
engine writes them to its cache. Both go through it also in prefill, so every token attends to rounded ones, its own
included. One scale for all heads of a layer, from calibration (ModelOpt's ``k_scale`` and ``v_scale``); NVFP4 blocks
lie along the head dim. The gradient passes straight through.
"""

from typing import Any

import torch
from torch import Tensor

from megaqad.models.modules import CausalAttention
from megaqad.nvfp4 import tensor_amax
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.numbers import number_format


class QuantizedCausalAttention(CausalAttention):
    """``CausalAttention`` on rounded keys and values. Sharding as there; no collectives.

    Attributes:
        layer: global layer index.
        kv_format: a name of ``formats.FORMATS``.
        key_amax, value_amax: float32 [], largest absolute key and value seen in calibration. Part of the state dict,
            identical on all tensor- and data-parallel ranks.
        mode: what forward does with the quantizers.
        rounds: False leaves keys and values alone in mode ON.
    """

    key_amax: Tensor
    value_amax: Tensor

    def __init__(self, *args: Any, kv_format: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_format = kv_format
        self.layer = 0
        self.rounds = True
        self.mode = QuantizerMode.OFF
        for name in ("key_amax", "value_amax"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device()))

    @property
    def hf_modules(self) -> tuple[str, str]:
        """The modules whose outputs these are, by which the scales are named."""
        prefix = f"model.layers.{self.layer}.self_attn"
        return f"{prefix}.k_proj", f"{prefix}.v_proj"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``CausalAttention.forward``."""
        if self.mode is QuantizerMode.CALIBRATE:
            for amax, x in ((self.key_amax, key), (self.value_amax, value)):
                amax.copy_(torch.maximum(amax, tensor_amax(x.detach())))
        elif self.mode is QuantizerMode.ON and self.rounds:
            numbers = number_format(self.kv_format)
            key, value = numbers.round_input(key, self.key_amax), numbers.round_input(value, self.value_amax)
        return super().forward(query, key, value, *args, **kwargs)
