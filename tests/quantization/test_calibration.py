"""Calibration reads data exactly where a scale comes from them."""

import pytest
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook

from megaqad.config import load_settings
from megaqad.models.causal_lm import CausalLM
from megaqad.quantization.model import cache_amaxes, input_amaxes
from megaqad.recovery.session import Session
from megaqad.runtime.ranks import shutdown_parallel
from tests.distillation.runs import SMALL_RUN, run_command
from tests.models.checkpoints import make_checkpoint

WEIGHT_ONLY = "quantization=nvfp4_weight_only"
ONE_LAYER_FP8 = "quantization.formats={model.layers.1.*:fp8}"
RECIPES = {
    "weights": ([WEIGHT_ONLY], 0, 0),
    "weights-mse-learned": ([WEIGHT_ONLY, "quantization.calibration=mse", "quantization.weight_scales=learned"], 0, 0),
    "weights-and-head": ([WEIGHT_ONLY, "quantization.exclude=[]"], 0, 0),
    "weights-and-cast-cache": ([WEIGHT_ONLY, "quantization.kv_cache=fp8_cast"], 0, 8),
    "weights-and-cache": ([WEIGHT_ONLY, "quantization.kv_cache=fp8"], 0, 8),
    "one-layer-fp8": ([WEIGHT_ONLY, ONE_LAYER_FP8], 7, 0),
    "w4a4": (["quantization=nvfp4"], 28, 0),
    "dynamic": (["quantization=nvfp4", "quantization.activation_scales=dynamic"], 0, 0),
    "mxfp8": (["quantization=mxfp8"], 0, 0),
}
"""Overrides, and of how many modules an input and of how many an output has a scale; of 4 layers of 7 modules."""
READ_DATA = {"weights-and-cache", "one-layer-fp8", "w4a4"}


def calibrated(rank: int, world_size: int, overrides: list[str]) -> tuple[int, int, int]:
    """(forward passes of the model, inputs with an amax, outputs with one) of a calibration."""
    session = Session.start(load_settings([*SMALL_RUN, *overrides]))
    passes = []
    hook = register_module_forward_hook(lambda module, _input, _output: passes.append(type(module)))
    try:
        student = session.calibrated_student()
        inputs, outputs = input_amaxes(student), cache_amaxes(student)
        return passes.count(CausalLM), sum(map(bool, inputs.values())), sum(map(bool, outputs.values()))
    finally:
        hook.remove()
        shutdown_parallel()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", RECIPES)
def test_data_are_read_where_a_scale_comes_from_them(run_ranks, model, tmp_path, name):
    overrides, inputs, outputs = RECIPES[name]
    arguments = [f"model={model}", f"output_dir={tmp_path}", *overrides]
    [(passes, found_inputs, found_outputs)] = run_ranks(1, calibrated, arguments)
    assert passes == (8 if name in READ_DATA else 0)  # 8 sequences, one at a time
    assert (found_inputs, found_outputs) == (inputs, outputs)


def amaxes(rank: int, world_size: int, overrides: list[str]) -> dict[str, float]:
    """Calibrated maxima of the inputs and outputs on this rank."""
    session = Session.start(load_settings([*SMALL_RUN, *overrides]))
    try:
        student = session.calibrated_student()
        return input_amaxes(student) | {f"{name} output": amax for name, amax in cache_amaxes(student).items()}
    finally:
        shutdown_parallel()


LAYOUTS = [
    (2, ["parallel.data=2", "train.micro_batch_size=1"]),
    (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    (4, ["parallel.tensor=2", "parallel.data=2", "parallel.sequence=true"]),
    (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
]


@pytest.mark.parametrize(("samples", "percentile"), [(1, 99), (5, 99), (100, 100)])
def test_any_number_of_sequences_is_the_same_in_every_layout(run_ranks, model, tmp_path, samples, percentile):
    """Sequences that only fill up ranks or an interleaved schedule are not looked at, and none twice: of 100 there are
    8. Percentiles count, so they would show one that is."""
    options = [
        *(f"model={model}", "quantization.kv_cache=fp8", "quantization.exclude=[]"),
        *(f"quantization.calibration_samples={samples}", f"quantization.activation_percentile={percentile}"),
    ]
    [expected] = run_ranks(1, amaxes, [*options, f"output_dir={tmp_path / 'one'}"])
    assert len(expected) == 4 * 7 + 1 + 4 * 2
    for number, (ranks, layout) in enumerate(LAYOUTS):
        found = run_ranks(ranks, amaxes, [*options, f"output_dir={tmp_path / str(number)}", *layout])
        for name, amax in {name: amax for part in found for name, amax in part.items()}.items():
            assert amax == expected[name], (layout, name)
        assert {name for part in found for name in part} == set(expected)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_checkpoint_with_nan_is_refused_without_calibration_data(run_ranks, tmp_path, tensor):
    folder = make_checkpoint("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = [*SMALL_RUN, f"model={folder}", f"output_dir={tmp_path / 'run'}", WEIGHT_ONLY]
    (refusal,) = set(run_ranks(2, run_command, "quantize", [*arguments, "parallel.pipeline=2"]))
    assert refusal is not None
    assert f"model.safetensors: {tensor} holds NaN or Inf; repair the checkpoint" in refusal
