"""Sites: the places of a model where numbers are rounded. A linear layer, the experts of a layer, a KV cache, the head.

A site owns everything about its rounding. It observes what passes in calibration, knows over which ranks its maxima
are taken and what becomes of one that saw nothing, quantizes its weight when that changes, and says what a checkpoint
stores of it. ``model.py`` does for all sites of a model what takes collectives, one for all of them.

A site is in one of three modes (``QuantizerMode``). In calibration it looks at its inputs; switched on, it multiplies
a quantized copy of its weight with inputs rounded at every forward. In training that copy is made once per optimizer
step and kept; otherwise it is made for each product, so that a model takes the memory of its weights alone. The scale
of inputs is calibrated or each token's own; the weight's follows from the weight as it is, by the method that the
recipe names.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaqad.models.weights import Weight
from megaqad.nvfp4 import choose_scales, dequantize, global_scale_from_amax, quantize, row_amax, tensor_amax
from megaqad.nvfp4.format import E4M3_MAX
from megaqad.quantization.formats import LinearFormat, cache_number, calibrates_cache
from megaqad.quantization.numbers import EXPORT_DTYPE, Packed, fp8_scale, number_format
from megaqad.quantization.scales import DEFAULT_SCALING, Scaling, count_magnitudes

ELEMENTS_AT_ONCE = 1 << 22
"""Of a weight, where its errors are summed in FP64."""


class QuantizerMode(Enum):
    """What a site does in forward."""

    OFF = "off"  # the BF16 layer
    CALIBRATE = "calibrate"  # the BF16 layer, recording the largest input
    ON = "on"  # the quantized layer


@dataclass(frozen=True, eq=False)
class Observed:
    """Maxima that calibration finds, and how."""

    names: tuple[str, ...]
    """Of the Hugging Face modules whose input, or output, it is; one for each element of ``amax``."""
    what: str
    """``input`` or ``output``."""
    amax: Tensor
    """float32 [] or [n], this rank's buffer."""
    groups: tuple[dist.ProcessGroup, ...]
    """The ranks that see other parts of the same data, or other data."""
    counts: Tensor | None = None
    """int64 [32768], for a percentile: how often each magnitude was seen (``count_magnitudes``)."""
    percentile: float = 100.0
    layer_groups: tuple[dist.ProcessGroup, ...] = ()
    """The ranks that hold the other experts of the layer."""
    shared: bool = False
    """Whether all experts of the layer get its maximum."""


class Site(nn.Module):
    """What ``model.py`` asks of every site. Mixed in before the layer itself."""

    mode: QuantizerMode = QuantizerMode.OFF

    def observed(self) -> list[Observed]:
        """What calibration must find here; nothing where no scale comes from data."""
        raise NotImplementedError

    def forget(self) -> None:
        """Before calibration: nothing has been seen."""
        for one in self.observed():
            one.amax.zero_()


class WeightSite(Site):
    """A site with a weight, of one linear layer or of the experts of a layer together.

    Attributes:
        weights: the weights that this rank holds here: one, or one for each of its experts.
        quantization: its formats.
        input_amax: float32 [], or [experts], largest absolute input seen in calibration; 0 until then. Part of the
            state, identical on all ranks that hold a part or a copy. Stays 0 where inputs have no scale from
            calibration.
        input_counts: while it calibrates a percentile, how often each magnitude was seen.
    """

    weights: tuple[Weight, ...]
    quantization: LinearFormat
    input_amax: Tensor
    input_counts: Tensor | None

    def set_up(
        self,
        weights: Sequence[Weight],
        quantization: LinearFormat,
        scaling: Scaling,
        *,
        observes: tuple[dist.ProcessGroup, ...],
        divides: dist.ProcessGroup,
    ) -> None:
        """Quantizers off, nothing calibrated; called by the layer once it has its weight.

        Args:
            observes: ranks over which the input's maximum is taken.
            divides: ranks that divide the weight.
        """
        self.weights = tuple(weights)
        self.quantization = quantization
        self._scaling = scaling
        self.observes, self.divides = observes, divides
        self.input_counts = None
        shape = () if self.weights[0].expert is None else (len(self.weights),)
        amax = torch.zeros(shape, dtype=torch.float32, device=self.current_weight().device)
        self.register_buffer("input_amax", amax)
        self._kept_copy: Tensor | None = None
        self._scales: tuple[Tensor, Tensor | None] | None = None

    @property
    def title(self) -> str:
        """Names of its modules for people: ``*`` stands for the number of an expert."""
        first = self.weights[0]
        names = first.modules
        if first.expert is not None:
            names = tuple(re.sub(rf"\.{first.expert}\.([^.]+)$", r".*.\1", name) for name in names)
        return ", ".join(names)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Hugging Face names of the modules that it holds."""
        return tuple(name for weight in self.weights for name in weight.modules)

    def current_weight(self) -> Tensor:
        """The trained weight, this rank's shard [N, K] or [experts, N, K], in its own dtype; asked every time, since
        DDP moves parameters into buffers of its own."""
        raise NotImplementedError

    @property
    def input_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the parts of one token's input; None when this rank holds all of it."""
        return None

    @property
    def scaling(self) -> Scaling:
        """How scales come about; those of weights are chosen in NVFP4 only."""
        if self.quantization.weights == "nvfp4":
            return self._scaling
        return replace(DEFAULT_SCALING, activation_percentile=self._scaling.activation_percentile)

    def observed(self) -> list[Observed]:
        if not self.quantization.calibrates_inputs:
            return []
        names = tuple(weight.modules[0] for weight in self.weights)
        percentile = self.scaling.activation_percentile
        return [Observed(names, "input", self.input_amax, self.observes, self.input_counts, percentile)]

    def forget(self) -> None:
        super().forget()
        self.input_counts = None

    def observe(self, x: Tensor) -> None:
        """Calibrate on an input of any shape: its largest magnitude and, for a percentile, how many it has of each.
        Nothing where inputs have no scale from calibration."""
        if not self.quantization.calibrates_inputs:
            return
        self.input_amax.copy_(torch.maximum(self.input_amax, tensor_amax(x.detach())))
        if self.scaling.activation_percentile < 100:
            counts = count_magnitudes(x)
            self.input_counts = counts if self.input_counts is None else self.input_counts + counts

    def amax_of(self, x: Tensor) -> Tensor:
        """What the scale of an input [.., K] comes from: float32 [], calibrated, or [.., 1], each token's own.

        Collective: dynamic and cut along K, one all-reduce (maximum) over ``input_group``.
        """
        if not self.quantization.dynamic:
            return self.input_amax
        amax = row_amax(x)
        if self.input_group is not None:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.input_group)
        return amax

    def export_weight(self) -> Tensor:
        """The weight as the checkpoint will hold it before quantization: BF16, no gradient."""
        return self.current_weight().detach().to(EXPORT_DTYPE)

    def largest_weights(self) -> Tensor:
        """float32 [n]: largest absolute value of this rank's shard of each of ``weights``; 0 where it is empty."""
        return tensor_amax(self.export_weight()).reshape(1)

    @property
    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(amax float32 [] or [experts], block_amax float32 [.., N, K / 16] or None for the blocks' own) of the
        quantized copy: what ``nvfp4.quantize`` makes the exported bytes with."""
        assert self._scales is not None, "the weights must be refreshed first"
        return self._scales

    def weight_scales(self, amax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scales of the coming quantized copy. ``amax``: as for ``refresh``."""
        assert amax is not None, "only scales that are state need no amax"
        if self.scaling.calibration == "max":
            return amax.reshape(()), None
        return choose_scales(self.export_weight(), amax.reshape(()), self.scaling.calibration)

    @torch.no_grad()
    def refresh(self, amax: Tensor | None) -> None:
        """Choose the scales of the weight as it is now, for the coming forwards. ``amax``: float32 [n], the maxima over
        all shards; None where scales are state."""
        self._scales = self.weight_scales(amax)
        self._kept_copy = None
        self._kept_copy = self.quantized_weight if self.training else None

    @property
    def quantized_weight(self) -> Tensor:
        """In the weight's shape and dtype: what forward multiplies with."""
        return self._rounded() if self._kept_copy is None else self._kept_copy

    @torch.no_grad()
    def _rounded(self) -> Tensor:
        """A quantized copy of the weight."""
        weight, (amax, block_amax) = self.current_weight(), self.scales
        if weight.dim() == 3:  # of each row, its expert's
            amax = amax.view(-1, 1, 1).expand(*weight.shape[:2], 1)
        if block_amax is None:
            return number_format(self.quantization.weights).round_weight(weight, amax)
        return dequantize(quantize(self.export_weight(), amax, block_amax=block_amax), weight.dtype)

    def squared_errors(self) -> Tensor:
        """float64 [2]: squared error of this rank's quantized weight, and its squared size."""
        rounded, weight = self.quantized_weight, self.export_weight()
        sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
        rows = max(1, ELEMENTS_AT_ONCE * len(weight) // max(1, weight.numel()))
        for ours, exact in zip(rounded.split(rows), weight.split(rows), strict=True):
            wide = exact.double()
            sums += torch.stack([(ours.double() - wide).square().sum(), wide.square().sum()])
        return sums

    def stored(self, place: int, shards: Sequence[Tensor], ranks: tuple[int, int]) -> list[Packed]:
        """What a checkpoint holds of ``weights[place]``: for each of its parts this rank's tensors, by their ending.

        Args:
            shards: this rank's part of each of the weight's parts, BF16 [N, K].
            ranks: (rank, ranks) among those that divide the weight.
        """
        weight, (amax, block_amax) = self.weights[place], self.scales
        if weight.expert is not None:
            amax, block_amax = amax[place], None if block_amax is None else block_amax[place]
        blocks: Sequence[Tensor | None] = [None] * len(shards)
        if block_amax is not None:
            blocks = weight.take(block_amax, *ranks)
        return [
            self._packed(shard, amax, block) | self._stored_input(place)
            for shard, block in zip(shards, blocks, strict=True)
        ]

    def _packed(self, shard: Tensor, amax: Tensor, block_amax: Tensor | None) -> Packed:
        if block_amax is None:
            return number_format(self.quantization.weights).quantize_weight(shard, amax)
        packed = quantize(shard, amax, block_amax=block_amax)
        return {"weight": packed.codes, "weight_scale": packed.block_scales, "weight_scale_2": packed.global_scale}

    def _stored_input(self, place: int) -> Packed:
        if not self.quantization.calibrates_inputs:
            return {}
        scale_of = global_scale_from_amax if self.quantization.activations == "nvfp4" else fp8_scale
        return {"input_scale": scale_of(self.input_amax if self.input_amax.dim() == 0 else self.input_amax[place])}


class CacheSite(Site):
    """The KV cache as the engine keeps it: attention on keys and values that went through a number format.

    Keys are rounded after the rotary embedding and the head norm, values as the projection made them: that is when an
    engine writes them to its cache. Both go through it also in prefill, so every token attends to rounded ones, its own
    included. One scale for all heads of a layer, from calibration (ModelOpt's ``k_scale`` and ``v_scale``) or 1, that
    is an amax of 448 in NVFP4 too, where engines put the range of four-bit codes in themselves; NVFP4 blocks lie along
    the head dim. The gradient passes straight through.

    Attributes:
        key_amax, value_amax: float32 [], largest absolute key and value seen in calibration, or 448. Part of the state,
            identical on all tensor- and data-parallel ranks.
    """

    key_amax: Tensor
    value_amax: Tensor

    def __init__(
        self, key: str, value: str, kv_format: str, *, rounds: bool, observes: tuple[dist.ProcessGroup, ...]
    ) -> None:
        """
        Args:
            key, value: Hugging Face modules that make the keys and values.
            kv_format: a member of ``formats.KV_CACHE``.
            rounds: False leaves keys and values alone in mode ON.
            observes: ranks over which maxima are taken.
        """
        super().__init__()
        self.names, self.kv_format, self.rounds, self.observes = (key, value), kv_format, rounds, observes
        amax = 0.0 if calibrates_cache(kv_format) else E4M3_MAX
        for name in ("key_amax", "value_amax"):
            self.register_buffer(name, torch.tensor(amax, dtype=torch.float32, device=torch.cuda.current_device()))

    def observed(self) -> list[Observed]:
        if not calibrates_cache(self.kv_format):
            return []
        amaxes = (self.key_amax, self.value_amax)
        return [Observed((name,), "output", amax, self.observes) for name, amax in zip(self.names, amaxes, strict=True)]

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [s, b, g, d] of this rank's heads as attention sees them; no collectives."""
        if self.mode is QuantizerMode.CALIBRATE and calibrates_cache(self.kv_format):
            for amax, x in ((self.key_amax, key), (self.value_amax, value)):
                amax.copy_(torch.maximum(amax, tensor_amax(x.detach())))
        elif self.mode is QuantizerMode.ON and self.rounds:
            number = cache_number(self.kv_format)
            assert number is not None
            numbers = number_format(number)
            return numbers.round_input(key, self.key_amax), numbers.round_input(value, self.value_amax)
        return key, value

    def stored(self, module: str) -> Packed:
        """The scale of what ``module`` makes, as ``k_scale`` or ``v_scale``. Engines leave FP8's range to it whatever
        the cache's format."""
        key, _ = self.names
        return {"k_scale": fp8_scale(self.key_amax)} if module == key else {"v_scale": fp8_scale(self.value_amax)}
