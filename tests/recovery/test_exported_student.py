"""An export as the student to go on from: its weights stay what they are, and training starts where it stood."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaqad.config import check_settings, load_settings
from megaqad.errors import UserError
from tests.distillation.runs import SMALL_RUN, export_digests, run_command, train_curve
from tests.models.checkpoints import make_checkpoint
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("mistral", tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an export, NVFP4's negative zeros as zeros: BF16 values have no use for the sign of one."""
    tensors = load_file(folder / "export" / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            low, high = tensor & 15, tensor >> 4
            tensors[name] = torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4
    return tensors


@pytest.mark.parametrize("layout", ["modelopt", "compressed_tensors"])
def test_exported_again_it_is_the_same(model, tmp_path, layout):
    run = [f"model={model}", "quantization=nvfp4_weight_only", f"export.format={layout}"]
    run_ranks(1, export_digests, [*run, f"output_dir={tmp_path / 'first'}"])
    again = [*run, f"output_dir={tmp_path / 'again'}", f"student={tmp_path / 'first' / 'export'}"]
    run_ranks(2, export_digests, [*again, "parallel.tensor=2"])
    first, second = stored(tmp_path / "first"), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.float(), second[name].float()), name


def test_training_goes_on_from_it(model, tmp_path):
    run = [f"model={model}", "quantization=nvfp4"]
    trained = [*run, f"output_dir={tmp_path / 'first'}", "train.steps=12"]
    [curve] = run_ranks(1, train_curve, trained)
    assert run_ranks(1, run_command, "export", [*SMALL_RUN, *trained]) == [None]
    onward = [*run, f"output_dir={tmp_path / 'onward'}", f"student={tmp_path / 'first' / 'export'}", "train.steps=2"]
    [more] = run_ranks(1, train_curve, onward)
    assert more[0]["loss"] == pytest.approx(curve[-1]["loss"], rel=0.1)
    assert more[0]["loss"] < 0.8 * curve[0]["loss"]
    assert "student" in json.loads((tmp_path / "onward" / "run.json").read_text())


def test_what_cannot_be_a_start_is_refused(model, tmp_path):
    run = [*SMALL_RUN, f"model={model}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"student=.*holds no config\.json: distill starts from"):
        check_settings("distill", load_settings([*run, f"student={tmp_path}"]))
    other = make_checkpoint("mistral", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match="has other tensors than model="):
        check_settings("distill", load_settings([*run, f"student={other}"]))
