"""The modules that replace Megatron-Core's compute what transformers computes, to the bit where order allows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaqad.models.blocks.attention import causal_attention
from megaqad.models.blocks.block import Builder
from megaqad.models.blocks.norm import Norm
from megaqad.models.blocks.plain import PlainChoices
from megaqad.models.build import copy_model, transformer_config
from megaqad.models.families import describe_model
from megaqad.runtime.ranks import ParallelSizes, parallel
from tests.models.checkpoints import CASES, hf_config, make_checkpoint, random_tokens
from tests.models.megatron_runs import loaded_model, run_hidden
from tests.ranks import run_ranks


@pytest.mark.parametrize("case", ["llama", "llama_tied_scaled"])
def test_rotary_frequencies_equal_transformers(case: str, tmp_path: Path) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf_config(case)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    rotary = describe_model(tmp_path).attentions[0].rotary
    assert rotary is not None
    assert torch.equal(rotary.frequencies(16)[0], LlamaRotaryEmbedding(config).inv_freq)


def norms(rank: int, world: int, folder: Path) -> Any:
    """RMSNorm against transformers' in both dtypes; on a rank, where Megatron is."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    torch.manual_seed(0)
    outputs = []
    with parallel(ParallelSizes()) as ranks:
        for dtype in (torch.float32, torch.bfloat16):
            builder = Builder(
                transformer_config(describe_model(folder), ranks.sizes, dtype=dtype), ranks, PlainChoices()
            )
            for order, kind in (
                ("cast_first", LlamaRMSNorm),
                ("weight_first", Olmo2RMSNorm),
                ("centred", Gemma3RMSNorm),
            ):
                ours, theirs = Norm("norm", 64, 1e-5, order).build(builder), kind(64, eps=1e-5).to(dtype)
                weight = torch.randn(64, dtype=dtype)
                ours.weight.data.copy_(weight)
                theirs.weight.data.copy_(weight)
                x = torch.randn(7, 3, 64, dtype=dtype)
                outputs.append(torch.equal(ours(x), theirs(x)))
    return outputs


def test_norms_equal_transformers(tmp_path: Path) -> None:
    assert run_ranks(1, norms, make_checkpoint("llama", tmp_path))[0] == [True] * 6


@pytest.mark.parametrize("window", [None, 1, 4, 9, 50])
def test_attention_is_its_definition(window: int | None) -> None:
    query, key, value = torch.randn(9, 2, 6, 8), torch.randn(9, 2, 3, 8), torch.randn(9, 2, 3, 8)
    mixed = causal_attention(query, key, value, scale=0.3, window=window)
    wide = [tensor.repeat_interleave(2, dim=2) for tensor in (key, value)]
    scores = torch.einsum("sbnd,tbnd->bnst", query, wide[0]) * 0.3
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    if window is not None:
        seen &= torch.ones(9, 9, dtype=torch.bool).triu(1 - window)
    scores.masked_fill_(~seen, float("-inf"))
    expected = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), wide[1]).flatten(2)
    assert torch.allclose(mixed, expected, atol=1e-6)


def attention_memory(rank: int, world: int, length: int, window: int | None) -> float:
    """Growth of the peak resident set over forward and backward, in units of one head's s x s scores in FP32."""
    import resource

    query = torch.randn(length, 1, 8, 16, requires_grad=True)
    key, value = (torch.randn(length, 1, 2, 16, requires_grad=True) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    causal_attention(query, key, value, window=window).square().sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return grown / (length * length * 4)


@pytest.mark.parametrize("window", [None, 256])
def test_attention_does_not_hold_the_scores(window: int | None) -> None:
    """Eight heads' scores would be eight; one head's alone would be one."""
    assert run_ranks(1, attention_memory, 4096, window)[0] < 0.9


def copied_hidden(rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray) -> Any:
    with parallel(sizes) as ranks, torch.no_grad():
        narrow = loaded_model(folder, ranks, torch.bfloat16)
        wide = loaded_model(folder, ranks, torch.float32)
        copy = copy_model(narrow, dtype=torch.float32)
        return [
            torch.equal(ours, theirs)
            for ours, theirs in zip(run_hidden(copy, tokens), run_hidden(wide, tokens), strict=True)
        ]


def test_a_copy_in_fp32_computes_what_the_checkpoint_does_in_fp32(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2", tmp_path, dtype=torch.bfloat16)
    tokens = random_tokens(CASES["qwen2"]["vocab_size"], batch=2, length=16)
    results = run_ranks(2, copied_hidden, folder, ParallelSizes(pipeline=2), tokens)
    assert results == [[], [True, True]]
