"""Which stored tensors transformers' model of a config is made of.

Most of its parameters are stored under their own names. Experts are not: a checkpoint holds one matrix for each expert
and projection, transformers one stack [experts, N, K] for all of them, gate above up. How names and shapes relate is
transformers' own table, used backwards to know what a checkpoint must hold, and forwards to know where it goes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaqad.export.client.files import VerificationError


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint that is not quantized."""

    name: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of transformers' model, or a buffer that checkpoints hold."""

    name: str
    shape: tuple[int, ...]
    experts: tuple[tuple[Source, ...], ...]
    """What each expert's slice is made of, one below the other; of a parameter without experts the one tensor."""
    linear: bool
    """Whether its sources are weights that inputs are multiplied with."""

    @property
    def sources(self) -> list[Source]:
        return [source for expert in self.experts for source in expert]

    def value(self, tensor_of: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """The parameter from its sources, which ``tensor_of`` gives by name."""
        first = self.experts[0][0]
        if first.shape == self.shape:
            return tensor_of(first.name).to(dtype)
        whole = torch.empty(self.shape, dtype=dtype)
        for slice_, expert in zip(whole, self.experts, strict=True):
            torch.cat([tensor_of(source.name).to(dtype) for source in expert], out=slice_)
        return whole


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of this config, its weights random; no code of the checkpoint's is run."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    # PyTorch's own attention, transformers' choice, leaves out the cap on scores that some models have.
    attention = "eager" if plain.get("attn_logit_softcapping") is not None else None
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
    return AutoModelForCausalLM.from_config(parsed, dtype=dtype, attn_implementation=attention)


def skeleton_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same without memory for its weights and buffers."""
    with torch.device("meta"):
        return model_of(config, dtype)


@torch.no_grad()
def parameters_of(model: Any) -> dict[str, Parameter]:
    """The parameters of transformers' ``model`` by name, in model order; of those that share memory the first.

    Raises:
        VerificationError: transformers makes one of them in a way that is not understood here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )

    state = model.state_dict()
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    held |= {name: buffer for name, buffer in model.named_buffers() if name in state}
    stored = revert_weight_conversion(model, held)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    made_of: dict[str, dict[str | None, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        made_of[parameter][pattern].append(Source(name, tuple(stored[name].shape)))
    owners = dict(model.named_modules())
    found = {}
    for name, tensor in held.items():
        owner, _, kind = name.rpartition(".")
        by_pattern, shape = made_of[name], tuple(tensor.shape)
        if set(by_pattern) == {None} and len(by_pattern[None]) == 1:
            linear = isinstance(owners[owner], nn.Linear) and kind == "weight"
            found[name] = Parameter(name, shape, ((by_pattern[None][0],),), linear)
            continue
        converter = next((one for one in converters if set(one.source_patterns) == set(by_pattern)), None)
        if converter is None or not _stacks_experts(converter.operations):
            raise VerificationError(
                f"transformers makes {name} in a way that verify does not know: set verify.model=off, and load the "
                "export with the engine that will serve it"
            )
        lists = (by_pattern[pattern] for pattern in converter.source_patterns)
        found[name] = Parameter(name, shape, tuple(zip(*lists, strict=True)), True)
    return found


def _stacks_experts(operations: list[Any]) -> bool:
    """Whether they lay the experts' matrices one behind the other, and those of one expert one below the other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(one, Concatenate) and one.dim == 1 for one in others)
