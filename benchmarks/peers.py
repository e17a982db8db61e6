"""What a user would run without megaqad, on one device: the Hugging Face model with SDPA.

`hugging_face` is a fine-tuning step of it; `modelopt` a QAD step as ModelOpt's documentation has it, with its
quantizers and the KL of whole logits. Both end with PyTorch's fused AdamW and a learning rate of 0, as ours do, but on
parameters in the run's dtype: there are no FP32 main parameters to read and write.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from megaqad.data import Batch
from megaqad.recovery.session import Session


def contestants(session: Session, batches: Sequence[Batch]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The steps by name, and why those that are missing are."""
    if session.ranks.world_size > 1:
        return {}, dict.fromkeys(("hugging_face", "modelopt"), "it runs on one rank")
    steps = {"hugging_face": fine_tuning_step(plain_model(session), batches)}
    lacks = modelopt_lacks(session)
    if lacks is not None:
        return steps, {"modelopt": lacks}
    return steps | {"modelopt": modelopt_step(session, batches)}, {}


def modelopt_lacks(session: Session) -> str | None:
    """Why ModelOpt cannot be measured beside this session."""
    if session.ranks.device.type != "cuda":
        return "its NVFP4 quantizer runs on CUDA only"
    if (session.plan.settings.weights, session.plan.settings.activations) != ("nvfp4", "nvfp4"):
        return "it is compared in W4A4: quantization=nvfp4"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("modelopt.torch.quantization")
    except Exception as error:  # it imports much of what it finds installed
        return f"ModelOpt cannot be imported ({error})"
    return None


def modelopt_step(session: Session, batches: Sequence[Batch]) -> Callable[[], object]:
    """The whole step over these microbatches, calibrated on the first."""
    import modelopt.torch.quantization as mtq

    teacher, student = plain_model(session), plain_model(session)
    teacher.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(student, mtq.NVFP4_DEFAULT_CFG, lambda model: model(batches[0].tokens))
    return distillation_step(teacher, student, batches)


def distillation_step(teacher: Any, student: Any, batches: Sequence[Batch]) -> Callable[[], object]:
    """Of two models of transformers on the batches' device."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    count = sum(batch.tokens.numel() for batch in batches)

    def step() -> None:
        for batch in batches:
            with torch.no_grad():
                target = teacher(batch.tokens).logits.float().log_softmax(-1)
            found = student(batch.tokens).logits.float().log_softmax(-1)
            loss = F.kl_div(found, target, reduction="sum", log_target=True) / count
            del target, found
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fine_tuning_step(student: Any, batches: Sequence[Batch]) -> Callable[[], object]:
    """Cross entropy to the labels, of a model of transformers on the batches' device."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    count = sum(batch.tokens.numel() for batch in batches)

    def step() -> None:
        for batch in batches:
            logits = student(batch.tokens).logits.float()
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / count
            del logits
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_model(session: Session) -> Any:
    """The session's model as transformers makes it, on its device, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(session.settings.model_dir)
    with session.ranks.device:
        return AutoModelForCausalLM.from_config(config, dtype=session.dtype, attn_implementation="sdpa").train()
