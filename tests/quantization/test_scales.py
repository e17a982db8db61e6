"""Weight scales that are frozen or learned: their gradients, their state, and the bytes that are exported from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megaqad.errors import UserError
from megaqad.quantization.scales import Scaling, count_magnitudes, percentile_of, scale_gradients
from megaqad.quantization.settings import QuantizationSettings
from tests.models.checkpoints import make_checkpoint

ROWS, INPUTS = 8, 64


def straight_through(exact, rounded):
    return exact + (rounded - exact).detach()


def fp64_reference(weight, amax, block_amax, gradient):
    """Autograd in FP64 through a plain reading of the forward pass; gradients of amax and block_amax."""
    amax = amax.double().requires_grad_()
    block_amax = block_amax.double().requires_grad_()
    global_scale = amax / 2688
    ideal = block_amax / (6 * global_scale)
    e4m3 = ideal.detach().clamp(2.0**-9, 448).float().to(torch.float8_e4m3fn).double()
    clamped = (ideal < 2**-10) | (ideal > 464)
    scale = (torch.where(clamped, e4m3, straight_through(ideal, e4m3)) * global_scale).unsqueeze(-1)
    y = weight.double().unflatten(-1, (-1, 16)) / scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nearest = (y.detach().abs().unsqueeze(-1) - grid).abs().argmin(-1)
    rounded = straight_through(y, grid[nearest] * y.detach().sign())
    quantized = (torch.where(y.abs() <= 6, rounded, 6 * y.detach().sign()) * scale).flatten(-2)
    (quantized * gradient.double()).sum().backward()
    return amax.grad / (weight.numel() * 6) ** 0.5, block_amax.grad / (16 * 6) ** 0.5


def example():
    generator = torch.Generator().manual_seed(2)
    weight = (
        torch.randn(ROWS, INPUTS, generator=generator) * 0.05
    )  # FP32: no exact ties, which two roundings break apart
    block_amax = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    block_amax = block_amax * torch.empty_like(block_amax).uniform_(0.6, 1.3, generator=generator)
    block_amax[0, 0] *= 1e-5  # below E4M3's range
    block_amax[1, 1] = 1.0  # above it
    return weight, weight.float().abs().max().reshape(1), block_amax, torch.randn(ROWS, INPUTS, generator=generator)


def test_gradients_are_those_of_fp64():
    weight, amax, block_amax, gradient = example()
    found = scale_gradients(gradient, weight, amax, block_amax)
    expected = fp64_reference(weight, amax, block_amax, gradient)
    assert expected[1].count_nonzero() == expected[1].numel() - 2
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_of_shards(dim):
    """The amax's is the sum over shards, the blocks' are the shards of the whole's."""
    weight, amax, block_amax, gradient = example()
    whole = scale_gradients(gradient, weight, amax, block_amax)
    parts = [
        scale_gradients(*one, ranks=2)
        for one in zip(
            gradient.chunk(2, dim), weight.chunk(2, dim), (amax, amax), block_amax.chunk(2, dim), strict=True
        )
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], dim), whole[1], rtol=1e-5, atol=1e-8)


def test_percentile_counts_exactly():
    x = torch.arange(1, 1001).float()
    counts = count_magnitudes(-x)
    assert percentile_of(counts, 100).item() == 1000
    for percentile in (99.9, 50, 12.5):
        wanted = x[int(np.ceil(10 * percentile)) - 1]
        found = percentile_of(counts, percentile)
        assert wanted <= found < wanted * (1 + 2**-7)
        assert percentile_of(3 * counts, percentile) == found  # three ranks that saw the same
    halves = count_magnitudes(x[:300]) + count_magnitudes(x[300:])
    assert torch.equal(halves, counts)


def exported(rank, world, folder, sizes, options):
    """Calibrate, maybe spoil the weights, export; what the forward pass multiplied with, by module name."""
    from megaqad.export.checkpoint import export_checkpoint
    from megaqad.quantization.model import weight_sites
    from megaqad.runtime.ranks import parallel
    from tests.quantization.models import calibrated_student

    with parallel(sizes) as ranks:
        model, plan = calibrated_student(ranks, folder, options["settings"], options["tokens"])
        if "move" in options:
            with torch.no_grad():
                for layer in weight_sites(model):
                    layer.current_weight().mul_(options["move"])
                    if layer.scaling.weight_scales == "learned":
                        layer.weight_amax.mul_(1.1)
                        layer.weight_block_amax.mul_(0.9)
            model.changed()
        export_checkpoint(model, plan, options["output_dir"], model_dir=folder)
        if world == 1:
            sites = [site for site in weight_sites(model) if len(site.module_names) == 1]
            return {site.module_names[0]: site.quantized_weight for site in sites}
        return None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


TOKENS = np.random.default_rng(0).integers(0, 64, (4, 24))
SETTINGS = [
    QuantizationSettings(calibration="mse"),
    QuantizationSettings(calibration="mse", exclude=[]),
    QuantizationSettings(calibration="four_over_six", activation_percentile=99.0),
    QuantizationSettings(calibration="four_over_six", activation_percentile=99.0, exclude=[]),
    QuantizationSettings(calibration="mse", weight_scales="frozen"),
    QuantizationSettings(calibration="max", weight_scales="learned"),
    QuantizationSettings(calibration="mse", weight_scales="learned", exclude=[]),  # the head's are refreshed
]


def named(settings):
    return f"{settings.calibration}-{settings.weight_scales}{'' if settings.exclude else '-head'}"


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_exported_bytes(settings, model, run_ranks, tmp_path):
    """Tensor 2 x pipeline 2 writes one rank's bytes, and they are the values that the student computes with."""
    from megaqad.export.dequantizer import read_nvfp4
    from megaqad.runtime.sizes import ParallelSizes

    files = []
    for sizes in (ParallelSizes(), ParallelSizes(tensor=2, pipeline=2)):
        output = tmp_path / f"{sizes.model_ranks}"
        options = {"settings": settings, "tokens": TOKENS, "output_dir": output, "move": 1.25}
        used = run_ranks(sizes.model_ranks, exported, model, sizes, options)[0]
        files.append(load_file(output / "model.safetensors"))
        if used is not None:
            assert ("lm_head" in used) == (settings.exclude == [])
            assert len(used) >= 4
            for name, value in used.items():
                parts = (files[0][f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
                assert torch.equal(read_nvfp4(*parts), value), name
    one, many = files
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), many[name].view(-1).view(torch.uint8)), name


def test_frozen_scales_stay_and_refreshed_follow(model, run_ranks, tmp_path):
    from megaqad.runtime.sizes import ParallelSizes

    found = {}
    for kind in ("frozen", "refreshed"):
        for move in (1.0, 2.0):
            options = {
                "settings": QuantizationSettings(weight_scales=kind),
                "tokens": TOKENS,
                "output_dir": tmp_path / f"{kind}{move}",
                "move": move,
            }
            run_ranks(1, exported, model, ParallelSizes(), options)
            files = load_file(options["output_dir"] / "model.safetensors")
            found[kind, move] = files["model.layers.0.mlp.down_proj.weight_scale_2"].item()
    assert found["frozen", 2.0] == found["frozen", 1.0] == found["refreshed", 1.0]
    assert found["refreshed", 2.0] == 2 * found["refreshed", 1.0]


def test_the_head_is_nearer_to_its_weight_by_the_methods_that_look_for_that(model, run_ranks, tmp_path):
    from megaqad.export.dequantizer import read_nvfp4
    from megaqad.runtime.sizes import ParallelSizes

    weight, errors = load_file(model / "model.safetensors")["lm_head.weight"].float(), {}
    for calibration in ("max", "four_over_six", "mse"):
        settings = QuantizationSettings(calibration=calibration, exclude=[])
        options = {"settings": settings, "tokens": TOKENS, "output_dir": tmp_path / calibration}
        run_ranks(1, exported, model, ParallelSizes(), options)
        files = load_file(options["output_dir"] / "model.safetensors")
        parts = (files[f"lm_head.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
        errors[calibration] = (read_nvfp4(*parts) - weight).norm().item()
    assert errors["mse"] < errors["four_over_six"] < errors["max"]


@pytest.mark.parametrize("number", ["nvfp4", "fp8"])
def test_a_percentile_lowers_every_input_scale(number, model, run_ranks, tmp_path):
    from megaqad.runtime.sizes import ParallelSizes

    scales = []
    for percentile in (100.0, 95.0):
        settings = QuantizationSettings(
            weights=number, activations=number, activation_percentile=percentile, exclude=[]
        )
        options = {"settings": settings, "tokens": TOKENS, "output_dir": tmp_path / f"{percentile}"}
        run_ranks(1, exported, model, ParallelSizes(), options)
        files = load_file(options["output_dir"] / "model.safetensors")
        scales.append({name: tensor.item() for name, tensor in files.items() if name.endswith("input_scale")})
    largest, lowered = scales
    assert len(largest) == 4 * 7 + 1
    assert all(lowered[name] < 0.9 * largest[name] for name in largest)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"calibration": "least"}, "quantization.calibration=least is unknown"),
        ({"weight_scales": "fixed"}, "quantization.weight_scales=fixed is unknown"),
        ({"scale_lr": 1e-4}, "quantization.scale_lr=0.0001 trains nothing"),
        ({"scale_lr": -1.0, "weight_scales": "learned"}, "scale_lr=-1.0 must be above 0"),
        (
            {"activation_scales": "auto"},
            "quantization.activation_scales=auto is unknown: choose one of static, dynamic",
        ),
        ({"activation_scales": "dynamic", "activations": "none"}, "activation_scales=dynamic has no effect"),
        (
            {"activation_scales": "dynamic", "weights": "mxfp8", "activations": "mxfp8", "formats": {"*": "mxfp4"}},
            "activation_scales=dynamic has no effect",
        ),
        ({"activation_scales": "dynamic", "activation_percentile": 99.9}, "activation_scales=dynamic has none"),
        ({"activation_percentile": 101}, "activation_percentile=101 must be above 0 and at most 100"),
    ],
)
def test_bad_settings(arguments, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        QuantizationSettings(**arguments)
    assert replace(Scaling(), weight_scales="learned").stored
