"""The KV cache as the engine keeps it: attention on keys and values that went through a number format.

Keys are rounded after the rotary embedding and the head norm, values as the projection made them: that is when an
engine writes them to its cache. Both go through it also in prefill, so every token attends to rounded ones, its own
included. One scale for all heads of a layer, from calibration (ModelOpt's ``k_scale`` and ``v_scale``) or 1, that is an
amax of 448 in NVFP4 too, where engines put the range of four-bit codes in themselves; NVFP4 blocks lie along the head
dim. The gradient passes straight through.
"""

from typing import Any

import torch
from torch import Tensor

from megaqad.models.modules import CausalAttention
from megaqad.nvfp4 import tensor_amax
from megaqad.nvfp4.format import E4M3_MAX
from megaqad.quantization.formats import cache_number, calibrates_cache
from megaqad.quantization.layers import QuantizerMode
from megaqad.quantization.numbers import number_format


class QuantizedCausalAttention(CausalAttention):
    """``CausalAttention`` on rounded keys and values. Sharding as there; no collectives.

    Attributes:
        layer: global layer index.
        kv_format: a member of ``formats.KV_CACHE``.
        key_amax, value_amax: float32 [], largest absolute key and value seen in calibration, or 448. Part of the state
            dict, identical on all tensor- and data-parallel ranks.
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
            amax = torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device())
            self.register_buffer(name, amax if self.calibrates else amax + E4M3_MAX)

    @property
    def calibrates(self) -> bool:
        """Whether its scales come from calibration."""
        return calibrates_cache(self.kv_format)

    @property
    def hf_modules(self) -> tuple[str, str]:
        """The modules whose outputs these are, by which the scales are named."""
        prefix = f"model.layers.{self.layer}.self_attn"
        return f"{prefix}.k_proj", f"{prefix}.v_proj"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``CausalAttention.forward``."""
        if self.mode is QuantizerMode.CALIBRATE and self.calibrates:
            for amax, x in ((self.key_amax, key), (self.value_amax, value)):
                amax.copy_(torch.maximum(amax, tensor_amax(x.detach())))
        elif self.mode is QuantizerMode.ON and self.rounds:
            number = cache_number(self.kv_format)
            assert number is not None
            numbers = number_format(number)
            key, value = numbers.round_input(key, self.key_amax), numbers.round_input(value, self.value_amax)
        return super().forward(query, key, value, *args, **kwargs)
