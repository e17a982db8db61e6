"""The quantized head and KV cache compute with rounded tensors; their gradients pass straight through."""

import pytest
import torch


def loss_parts(rank, world_size, sequence):
    """The head's weight, gradients of a loss through hidden states and head, and the calibrated amax."""
    from megaqad.quantization.calibrate import calibrate
    from megaqad.quantization.model import cache_sites
    from megaqad.runtime.ranks import ParallelSizes, parallel
    from tests.quantization.models import small_quantized_model

    with parallel(ParallelSizes(tensor=world_size, sequence=sequence), seed=3) as ranks:
        model = small_quantized_model(
            ranks, weights="fp8", activations="fp8", exclude=[], formats={"lm_head": "nvfp4"}, kv_cache="fp8"
        )
        tokens = torch.arange(32).view(1, 32)
        chunk = model.last
        calibrate(model, lambda: chunk(tokens))
        unrounded: list[torch.Tensor] = []
        handle = chunk.final_norm.register_forward_hook(lambda module, args, output: unrounded.append(output))
        hidden, head = chunk(tokens), chunk.head_weight()
        handle.remove()
        unrounded[0].retain_grad()
        (hidden.sum() + 2 * head.sum()).backward()
        quantizer = chunk.head_quantizer
        caches = [(cache.key_amax.item(), cache.value_amax.item(), cache.names) for cache in cache_sites(model)]
        return {
            "hidden": hidden.detach(),
            "unrounded": unrounded[0].detach(),
            "hidden_gradient": unrounded[0].grad,
            "head": head.detach(),
            "weight": chunk.original_head().detach().clone(),
            "weight_gradient": chunk.output_layer.weight.grad[: len(head)].clone(),
            "amax": quantizer.input_amax.item(),
            "caches": caches,
        }


@pytest.mark.parametrize(("ranks", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_head_is_rounded_on_both_sides(run_ranks, ranks, sequence):
    from megaqad.nvfp4 import fake_quantize, tensor_amax

    found = run_ranks(ranks, loss_parts, sequence)
    whole = torch.cat([part["weight"] for part in found])
    assert len(whole) == 515
    assert torch.equal(
        torch.cat([part["head"] for part in found]),
        fake_quantize(whole.bfloat16().float(), tensor_amax(whole.bfloat16())),
    )
    largest = max(part["unrounded"].abs().max().item() for part in found)
    for part in found:
        assert largest <= part["amax"] <= largest * (1 + 2**-4)  # calibrated on the unquantized model
        assert torch.equal(part["hidden"], fake_quantize(part["unrounded"], torch.tensor(part["amax"])))
        assert not torch.equal(part["hidden"], part["unrounded"])
        assert torch.equal(part["hidden_gradient"], torch.ones_like(part["hidden"]))
        assert torch.equal(part["weight_gradient"], torch.full_like(part["head"], 2.0))
        assert part["caches"] == found[0]["caches"]
    assert [names for *_, names in found[0]["caches"]][3][0] == "model.layers.3.self_attn.k_proj"
    assert all(key > 0 and value > 0 for key, value, _ in found[0]["caches"])


def attention_parts(rank, world_size, kv_format):
    """Output and gradients of attention on rounded keys and values, and on ones rounded beforehand."""
    from megaqad.models.blocks.attention import causal_attention
    from megaqad.quantization.formats import cache_number
    from megaqad.quantization.numbers import number_format
    from megaqad.quantization.site import CacheSite, QuantizerMode
    from megaqad.runtime.ranks import ParallelSizes, parallel

    with parallel(ParallelSizes()):
        site = CacheSite("k", "v", kv_format, rounds=True, observes=())
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(8, 2, heads, 16, generator=generator) for heads in (4, 2, 2))
        site.mode = QuantizerMode.CALIBRATE
        site(key, value)
        amaxes = (site.key_amax, site.value_amax)
        numbers = number_format(cache_number(kv_format))
        rounded = [numbers.round_input(x, amax) for x, amax in zip((key, value), amaxes, strict=True)]
        results = []
        for mode, operands in ((QuantizerMode.ON, (key, value)), (QuantizerMode.OFF, rounded)):
            site.mode = mode
            leaves = [x.clone().requires_grad_() for x in operands]
            output = causal_attention(query, *site(*leaves))
            output.square().sum().backward()
            results.append([output.detach(), *(leaf.grad for leaf in leaves)])
        return results, [amax.item() for amax in amaxes], [key.abs().max().item(), value.abs().max().item()]


@pytest.mark.parametrize("kv_format", ["fp8", "nvfp4", "fp8_cast", "nvfp4_cast"])
def test_attention_sees_rounded_keys_and_values(run_ranks, kv_format):
    (ours, rounded_before), amaxes, largest = run_ranks(1, attention_parts, kv_format)[0]
    for found, expected in zip(ours, rounded_before, strict=True):
        torch.testing.assert_close(found, expected)
    assert amaxes == ([448.0, 448.0] if kv_format.endswith("cast") else largest)
