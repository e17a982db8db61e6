"""What an NVFP4 layer saves for backward is packed, and its gradients do not notice."""

import pytest
import torch


def saved_bytes(work):
    """(result of ``work``, bytes of every distinct tensor that it saves for backward, by dtype)."""
    found = {}

    def keep(tensor):
        found[tensor.data_ptr()] = (tensor.dtype, tensor.numel() * tensor.element_size())
        kept.append(tensor)  # no address is used twice
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    sizes = {}
    for dtype, size in found.values():
        sizes[dtype] = sizes.get(dtype, 0) + size
    return result, sizes


def train_once(rank, world_size, packs, dtype, options):
    """Losses' gradients of a whole small model after two microbatches; refreshes of the weights counted."""
    from megaqad.distillation.forward import forward_hidden
    from megaqad.quantization.calibrate import calibrate
    from megaqad.quantization.model import weight_sites
    from megaqad.runtime.ranks import ParallelSizes, parallel
    from tests.quantization.models import small_quantized_model

    with parallel(ParallelSizes(tensor=world_size, sequence=options["sequence"])) as ranks:
        torch.manual_seed(11)
        recipe = options.get("recipe", {})
        model = small_quantized_model(ranks, dtype=dtype, recompute=options["recompute"], **recipe)
        tokens = torch.randint(0, 64, (2, 1, 16), generator=torch.Generator().manual_seed(5))
        calibrate(model, lambda: forward_hidden(model, list(tokens)))
        for layer in weight_sites(model):
            layer.packs_inputs = packs
        for batch in tokens:
            hidden = model.last(batch)
            hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(hidden.dtype))
        return {name: parameter.grad for name, parameter in model.last.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {"sequence": False, "recompute": False}),
        (2, {"sequence": False, "recompute": False}),
        (2, {"sequence": True, "recompute": False}),
        (2, {"sequence": True, "recompute": True}),
        (2, {"sequence": True, "recompute": True, "recipe": {"activation_scales": "dynamic"}}),
    ],
    ids=["tp1", "tp2", "tp2-sp", "tp2-sp-recompute", "tp2-sp-recompute-dynamic"],
)
def test_gradients_are_the_same_bits(run_ranks, ranks, options, dtype):
    for packed, plain in zip(
        run_ranks(ranks, train_once, True, dtype, options),
        run_ranks(ranks, train_once, False, dtype, options),
        strict=True,
    ):
        assert packed.keys() == plain.keys()
        assert sum(bool(gradient.abs().max() > 0) for gradient in packed.values()) > 8
        for name, gradient in packed.items():
            assert torch.equal(gradient, plain[name]), name


def bytes_of_one_layer(rank, world_size, packs, needs_gradient):
    """Bytes saved by one W4A4 layer in BF16 beside its weight."""
    from megaqad.models.model import Model
    from megaqad.quantization.calibrate import calibrate
    from megaqad.quantization.model import weight_sites
    from megaqad.runtime.ranks import ParallelSizes, parallel
    from tests.quantization.models import small_quantized_model

    with parallel(ParallelSizes(tensor=world_size)) as ranks:
        layer = weight_sites(small_quantized_model(ranks, dtype=torch.bfloat16))[0]
        x = torch.randn(32, 2, layer.weight.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        calibrate(Model(None, [layer], ranks), lambda: layer(x))
        layer.packs_inputs = packs
        x.requires_grad_(needs_gradient)
        (output, _), sizes = saved_bytes(lambda: layer(x))
        output.sum().backward()
        weight = layer.weight.numel() * 2
        return sizes, x.numel() * 2, weight, layer.weight.grad


def test_an_input_takes_four_and_a_half_bits(run_ranks):
    """Counted by a hook that sees all that is saved: codes, block scales, one global scale, and no BF16 input."""
    [(packed, whole, weight, gradient)] = run_ranks(1, bytes_of_one_layer, True, True)
    [(plain, _, _, expected)] = run_ranks(1, bytes_of_one_layer, False, True)
    assert plain == {torch.bfloat16: whole + weight}
    assert packed == {torch.uint8: whole // 4, torch.float8_e4m3fn: whole // 32, torch.float32: 4}
    assert whole / sum(packed.values()) >= 3.4
    assert torch.equal(gradient, expected)


def test_an_input_that_needs_no_gradient(run_ranks):
    """A frozen embedding below: the weight's gradient still needs the input, packed."""
    [(packed, _, _, gradient)] = run_ranks(1, bytes_of_one_layer, True, False)
    [(_, _, _, expected)] = run_ranks(1, bytes_of_one_layer, False, False)
    assert torch.bfloat16 not in packed
    assert torch.equal(gradient, expected)
