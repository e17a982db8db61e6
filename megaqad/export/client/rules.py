"""What engines take for granted of a quantized checkpoint, or look at and then refuse; each rule once.

Read in vLLM 0.33 (``modelopt.py``, ``compressed_tensors_w4a4_nvfp4.py``), TensorRT-LLM (``linear.py``) and SGLang. That
a needed tensor is missing, an input scale above all, is found where tensors are counted: vLLM computes with whatever
memory holds then.
"""

import re
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from megaqad.export.client.checkpoint import Client
from megaqad.export.client.files import VerificationError

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "w13": ("w1", "w3")}
"""Modules that engines multiply as one, by the name of the one."""


def check_values(client: Client, name: str, tensor: Tensor) -> None:
    """Every value is a number and every scale positive, its reciprocal a number too.

    vLLM fills block scales with NaN before it loads them and gives up where one is left. Input scales of zero are
    divided by.

    Raises:
        VerificationError: names the tensor.
    """
    if tensor.dtype is torch.uint8:
        if name.endswith("_scale") and bool((tensor == 255).any()):  # E8M0's NaN
            raise VerificationError(f"{client.folder}: tensor {name} holds NaN; export again")
        return
    values = tensor.float()
    if not bool(values.isfinite().all()):
        raise VerificationError(f"{client.folder}: tensor {name} holds NaN or Inf; export again")
    if name.endswith(("_scale", "_scale_2")) and not bool(((values > 0) & values.reciprocal().isfinite()).all()):
        raise VerificationError(
            f"{client.folder}: tensor {name} holds a scale that is not positive or too small to divide by; export again"
        )


def check_rules(client: Client) -> None:
    """The rules that take more than one tensor.

    Raises:
        VerificationError: names the first module that breaks one.
    """
    for rule in (blocks_divide_inputs, fused_modules_are_alike, exclusions_name_whole_modules):
        rule(client)


def blocks_divide_inputs(client: Client) -> None:
    """K is a multiple of the block: vLLM and SGLang refuse other sizes."""
    for module, layout in client.layouts.items():
        inputs = client.linears[module].shape[1]
        if inputs % layout.block:
            raise VerificationError(
                f"{client.folder}: {module} has {inputs} inputs, no multiple of {layout.block}; leave it in BF16"
            )


def fused_modules_are_alike(client: Client) -> None:
    """Modules that engines fuse are in one format, under one weight scale and one input scale, to the last bit.

    vLLM takes the largest scale of the fused modules for all of them and leaves their codes as they are: with scales 1
    : 1/2 : 1/4 the third is off by 340 %. TensorRT-LLM stops.
    """
    for module in client.linears:
        parent, _, leaf = module.rpartition(".")
        for siblings in FUSED.values():
            names = [name for name in (f"{parent}.{sibling}" for sibling in siblings) if name in client.linears]
            if leaf != siblings[0] or len(names) == 1:
                continue
            layouts = [client.layouts.get(name) for name in names]
            if any(layout is not layouts[0] for layout in layouts):
                raise VerificationError(f"{client.folder}: {', '.join(names)} differ in format; export again")
            for kind in _scalars(client, module):
                values = {name: client.tensor(f"{name}.{kind}").item() for name in names}
                if len(set(values.values())) > 1:
                    raise VerificationError(
                        f"{client.folder}: {kind} differs among fused modules {values}; export again"
                    )


def _scalars(client: Client, module: str) -> list[str]:
    """Endings of a module's scales of whole tensors."""
    layout = client.layouts.get(module)
    return [] if layout is None else [ending for ending, (_, covers) in layout.tensors.items() if covers == 0]


def exclusions_name_whole_modules(client: Client) -> None:
    """No excluded name is found in the name of a quantized module.

    vLLM looks for excluded names as they are, then inside other names (``model.layers.1`` in ``model.layers.10``,
    ``mlp.gate`` in ``mlp.gate_up_proj``), then as patterns, and it looks in the names of its fused modules.
    """
    for name in dict.fromkeys(_engine_name(module) for module in client.layouts):
        for excluded in client.declared.excluded:
            if excluded in name or fnmatchcase(name, excluded):
                raise VerificationError(
                    f"{client.folder}: {name} is quantized, but engines also take the excluded {excluded} for it; "
                    "exclude modules by their full names"
                )


def _engine_name(module: str) -> str:
    """What vLLM calls the module that holds it."""
    experts = re.match(r"(.*\.experts)\.\d+\.", module)
    if experts is not None:
        return experts[1]
    parent, _, leaf = module.rpartition(".")
    return next((f"{parent}.{fused}" for fused, parts in FUSED.items() if leaf in parts), module)
