"""The Transformer Engine backend without its hardware: refusals, the recipe's fields, and the layers on a stand-in."""

import importlib.util
import json
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch

from megaqad import identity
from megaqad.config import load_settings
from megaqad.errors import UserError
from megaqad.quantization import backend
from megaqad.quantization.settings import QuantizationSettings
from megaqad.quantization.transformer_engine import RECIPE, nvfp4_recipe
from tests.models.checkpoints import make_checkpoint

SETTINGS = QuantizationSettings(backend="transformer_engine")
INSTALLED = importlib.util.find_spec("transformer_engine") is not None


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with this GPU and this Transformer Engine."""

    def pretend(capability, version):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(backend, "_transformer_engine_version", lambda: version)

    return pretend


@pytest.mark.parametrize(
    ("capability", "version", "told"),
    [
        (None, (2, 20), "this machine has no CUDA device"),
        ((9, 0), (2, 20), "this one has 9.0"),
        ((10, 0), None, "pip install 'megaqad\\[cuda\\]'"),
        ((12, 0), (2, 14), "2.15 or newer, installed is 2.14"),
    ],
)
def test_machines_that_cannot_are_refused(machine, capability, version, told):
    machine(capability, version)
    with pytest.raises(UserError, match=told) as refused:
        backend.check_backend(SETTINGS, "bfloat16")
    assert "quantization.backend=emulated" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_blackwell_is_accepted_and_the_emulated_backend_needs_nothing(machine):
    machine((10, 0), (2, 15))
    backend.check_backend(SETTINGS, "bfloat16")
    machine(None, None)
    backend.check_backend(replace(SETTINGS, backend="emulated"), "float32")


@pytest.mark.parametrize(
    ("changes", "dtype", "told"),
    [
        ({"activations": "none"}, "bfloat16", "not quantization.weights=nvfp4 with quantization.activations=none"),
        (
            {"activation_scales": "dynamic"},
            "bfloat16",
            "not each token's own as quantization.activation_scales=dynamic",
        ),
        ({}, "float32", "runtime.dtype=float32 would train another function"),
    ],
)
def test_what_it_would_compute_otherwise_is_refused(machine, changes, dtype, told):
    machine((10, 0), (2, 20))
    with pytest.raises(UserError, match=told):
        backend.check_backend(replace(SETTINGS, **changes), dtype)


def test_versions_are_read_as_packages_write_them(monkeypatch):
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "2.15.0+5aff3928")
    assert backend._transformer_engine_version() == (2, 15)


@pytest.mark.skipif(INSTALLED, reason="the installed one is checked below")
def test_the_recipe_names_fields_that_exist(monkeypatch):
    """Against the fields of ``NVFP4BlockScaling`` in Transformer Engine 2.15."""

    @dataclass
    class NVFP4BlockScaling:
        disable_rht: bool = False
        disable_stochastic_rounding: bool = False
        disable_2d_quantization: bool = False
        fp4_format: object = None
        fp8_format: object = None
        fp8_dpa: bool = False
        fp8_mha: bool = False
        backward_override: str | None = None

    modules = {name: types.ModuleType(name) for name in ("transformer_engine", "transformer_engine.common")}
    recipes = types.ModuleType("transformer_engine.common.recipe")
    recipes.NVFP4BlockScaling = NVFP4BlockScaling
    for name, module in {**modules, "transformer_engine.common.recipe": recipes}.items():
        monkeypatch.setitem(sys.modules, name, module)
    recipe = nvfp4_recipe()
    assert recipe.disable_rht
    assert recipe.disable_stochastic_rounding
    assert recipe.disable_2d_quantization
    assert recipe.backward_override == "dequantized"


@pytest.mark.skipif(not INSTALLED, reason="Transformer Engine is not installed")
def test_the_installed_recipe_has_the_fields():
    recipe = nvfp4_recipe()
    for name, value in RECIPE.items():
        assert vars(recipe)[name] == value
    for quantized in (recipe.fp4_quant_fwd_inp, recipe.fp4_quant_fwd_weight, recipe.fp4_quant_bwd_grad):
        assert not quantized.random_hadamard_transform
        assert not quantized.stochastic_rounding
        assert not quantized.fp4_2d_quantization


def both_backends(ranks):
    """The same random model on the stand-in and emulated, calibrated on the same tokens; the tokens."""
    from megaqad.distillation.forward import forward_hidden
    from megaqad.quantization import transformer_engine
    from megaqad.quantization.calibrate import calibrate
    from tests.quantization import stand_in_engine
    from tests.quantization.models import small_quantized_model

    real = transformer_engine.transformer_engine_layers
    transformer_engine.transformer_engine_layers = stand_in_engine.layers
    try:
        engine = small_quantized_model(ranks, backend="transformer_engine")
    finally:
        transformer_engine.transformer_engine_layers = real
    emulated = small_quantized_model(ranks)
    with torch.no_grad():
        for ours, theirs in zip(engine.last.parameters(), emulated.last.parameters(), strict=True):
            ours.copy_(ours.bfloat16())
            theirs.copy_(ours)
    tokens = [torch.arange(48).view(2, 24) % 500]
    for model in (engine, emulated):
        calibrate(model, lambda model=model: forward_hidden(model, tokens))
    return engine, emulated, tokens


def compare(rank, world_size):
    """What the two backends differ in: keys, scales, outputs, gradients; and how the kept weight follows."""
    from megaqad.distillation.forward import forward_hidden
    from megaqad.quantization.model import switch, weight_sites
    from megaqad.quantization.site import QuantizerMode
    from megaqad.runtime.ranks import ParallelSizes, parallel
    from megaqad.training.pieces import model_pieces

    with parallel(ParallelSizes()) as ranks:
        engine, emulated, tokens = both_backends(ranks)
        ours, theirs = (model_pieces(model) for model in (engine, emulated))
        assert [piece.piece for piece in ours] == [piece.piece for piece in theirs]
        ours, theirs = (weight_sites(model) for model in (engine, emulated))
        assert [layer.input_amax for layer in ours] == [layer.input_amax for layer in theirs]
        assert all(torch.equal(a.quantized_weight, b.quantized_weight) for a, b in zip(ours, theirs, strict=True))

        layer, other = ours[0], theirs[0]
        x = torch.randn(5, 2, layer.weight.shape[1], generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
        x[0, 0, 0] = 2.0  # so that the calibrated scale and the input's own agree
        results = []
        for one in (layer, other):
            one.input_amax.fill_(2.0)
            inputs = x.clone().requires_grad_()
            output, _ = one(inputs)
            output.square().sum().backward()
            results.append((output.detach(), inputs.grad, one.weight.grad))
        for ours_, theirs_ in zip(*results, strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-6, atol=1e-6)

        (before,) = forward_hidden(engine, tokens)
        with torch.no_grad():
            layer.weight.mul_(2)
        (kept,) = forward_hidden(engine, tokens)
        engine.changed()
        for site in ours:
            site.mode = QuantizerMode.OFF
        (plain,) = forward_hidden(engine, tokens)
        for site in ours:
            site.mode = QuantizerMode.ON
        (after,) = forward_hidden(engine, tokens)
        switch(emulated, QuantizerMode.OFF)
        with torch.no_grad():
            other.weight.mul_(2)
        (plain_emulated,) = forward_hidden(emulated, tokens)
        torch.testing.assert_close(plain, plain_emulated)
        return torch.equal(before, kept), torch.equal(before, after)


def test_layers_are_the_emulated_ones_on_another_gemm(run_ranks):
    kept_until_refreshed, stale_after_refresh = run_ranks(1, compare)[0]
    assert kept_until_refreshed, "a weight is quantized once per optimizer step"
    assert not stale_after_refresh, "a forward pass with quantizers off in between must not hide the new weight"


def copied_layers(rank, world_size, folder):
    """Types of the layers in the FP32 copy of a student on the stand-in."""
    from megaqad.quantization.model import copy_quantized, weight_sites
    from megaqad.quantization.plan import plan_for
    from megaqad.runtime.ranks import ParallelSizes, parallel

    with parallel(ParallelSizes()) as ranks:
        engine, _, _ = both_backends(ranks)
        copied = copy_quantized(engine, plan_for(SETTINGS, engine.architecture), dtype=torch.float32)
        return {type(layer).__name__ for layer in weight_sites(copied)}


def test_the_copy_that_an_export_is_verified_with_is_emulated(run_ranks, tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    assert run_ranks(1, copied_layers, folder) == [{"NVFP4ColumnParallelLinear", "NVFP4RowParallelLinear"}]


@pytest.mark.parametrize(("setting", "told"), [("backend", None), ("auto", "quantization.auto=bits:6")])
def test_a_student_trained_on_it_is_read_on_any_machine(tmp_path, setting, told):
    folder = make_checkpoint("llama", tmp_path / "model")
    now = load_settings([f"model={folder}", f"output_dir={tmp_path}"])
    changes = {"backend": "transformer_engine", "auto": "bits:6"}
    then = replace(now, quantization=replace(now.quantization, **{setting: changes[setting]}))
    (tmp_path / identity.FILE).write_text(json.dumps(identity.identity_of("distill", then)))
    if told is None:
        identity.check_student(now)
    else:
        with pytest.raises(UserError, match=told):
            identity.check_student(now)
