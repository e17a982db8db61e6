"""The modules that replace Megatron-Core's compute what transformers computes, to the bit where order allows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaqad.models.build import copy_model
from megaqad.models.description import describe_model
from megaqad.models.modules import CausalAttention, RMSNorm, rotary_frequencies
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
    expected = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(rotary_frequencies(describe_model(tmp_path)), expected)


def test_llama_3_scaling_of_a_published_config(tmp_path: Path) -> None:
    """Llama 3.1's numbers, in the form older checkpoints have."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters={**scaling, "rope_theta": 500000.0}
    )
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "rope_scaling": scaling}
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert torch.equal(rotary_frequencies(describe_model(tmp_path)), LlamaRotaryEmbedding(config).inv_freq)


def module_outputs(rank: int, world: int) -> Any:
    """RMSNorm against transformers' in both dtypes, attention against its definition; on a rank, where Megatron is."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    outputs = []
    with parallel(ParallelSizes()):
        for dtype in (torch.float32, torch.bfloat16):
            config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=6, params_dtype=dtype)
            ours, theirs = RMSNorm(config, hidden_size=64, eps=1e-5), LlamaRMSNorm(64, eps=1e-5).to(dtype)
            weight = torch.randn(64, dtype=dtype)
            ours.weight.data.copy_(weight)
            theirs.weight.data.copy_(weight)
            x = torch.randn(7, 3, 64, dtype=dtype)
            outputs.append(torch.equal(ours(x), theirs(x)))
        attention = CausalAttention(config, 1, AttnMaskType.causal, "self")
        query, key, value = torch.randn(9, 2, 6, 8), torch.randn(9, 2, 3, 8), torch.randn(9, 2, 3, 8)
        mixed = attention(query, key, value, None, attn_mask_type=AttnMaskType.causal)
        wide = [tensor.repeat_interleave(2, dim=2) for tensor in (key, value)]
        scores = torch.einsum("sbnd,tbnd->bnst", query, wide[0]) / 8**0.5
        scores.masked_fill_(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
        expected = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), wide[1]).flatten(2)
        outputs.append(torch.allclose(mixed, expected, atol=1e-6))
    return outputs


def test_norm_and_attention() -> None:
    assert run_ranks(1, module_outputs)[0] == [True, True, True]


def attention_memory(rank: int, world: int, length: int) -> float:
    """Growth of the peak resident set over forward and backward, in units of one head's s x s scores in FP32."""
    import resource

    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    with parallel(ParallelSizes()):
        config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8)
        attention = CausalAttention(config, 1, AttnMaskType.causal, "self")
        query = torch.randn(length, 1, 8, 16, requires_grad=True)
        key, value = (torch.randn(length, 1, 2, 16, requires_grad=True) for _ in range(2))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attention(query, key, value, None).square().sum().backward()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        return grown / (length * length * 4)


def test_attention_does_not_hold_the_scores() -> None:
    """Eight heads' scores would be eight; one head's alone would be one."""
    assert run_ranks(1, attention_memory, 4096)[0] < 0.9


def copied_hidden(rank: int, world: int, folder: Path, sizes: ParallelSizes, tokens: np.ndarray) -> Any:
    with parallel(sizes) as context, torch.no_grad():
        narrow = loaded_model(folder, context, torch.bfloat16)
        wide = loaded_model(folder, context, torch.float32)
        copy = copy_model(narrow, describe_model(folder), context, dtype=torch.float32)
        return [
            torch.equal(ours, theirs)
            for ours, theirs in zip(run_hidden(copy, tokens), run_hidden(wide, tokens), strict=True)
        ]


def test_a_copy_in_fp32_computes_what_the_checkpoint_does_in_fp32(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2", tmp_path, dtype=torch.bfloat16)
    tokens = random_tokens(CASES["qwen2"]["vocab_size"], batch=2, length=16)
    results = run_ranks(2, copied_hidden, folder, ParallelSizes(pipeline=2), tokens)
    assert results == [[], [True, True]]
