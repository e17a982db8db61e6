"""Checkpoints that are stored in a number format are read as the values that they stand for, whole or in slices."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaqad.errors import UserError
from megaqad.models.checks import check_checkpoint
from megaqad.models.encodings import Checkpoint
from megaqad.models.families import describe_model
from megaqad.models.load import SliceReader
from megaqad.nvfp4 import dequantize, quantize
from megaqad.quantization.numbers import number_format
from tests.models.checkpoints import make_checkpoint


def encode(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Rewrite every projection of a checkpoint in a number format; the values that it then stands for."""
    path = folder / "model.safetensors"
    tensors, stored, values = load_file(path), {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            stored[name] = values[name] = tensor
            continue
        if kind == "block FP8":
            rows, columns = (-(-size // 32) for size in tensor.shape)
            scale = torch.rand(rows, columns) * 1e-3 + 1e-3
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: tensor.shape[0], : tensor.shape[1]]
            codes = (tensor / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored |= {name: codes, f"{name}_scale_inv": scale}
            values[name] = (codes.float() * spread).bfloat16()
        elif kind.startswith("FP8"):
            scale = torch.rand(() if "tensor" in kind else (tensor.shape[0], 1)) * 1e-3 + 1e-3
            codes = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored |= {name: codes, f"{name}_scale": scale.flatten() if "[N]" in kind else scale}
            values[name] = (codes.float() * scale).bfloat16()
        elif kind.startswith("MX"):
            number = number_format(kind[:5].lower())
            packed = number.quantize_weight(tensor.bfloat16(), tensor.abs().amax())
            values[name] = number.dequantize_weight(packed, torch.bfloat16)
            codes = name if "ModelOpt" in kind else f"{name}_packed"
            stored |= {codes: packed["weight"], f"{name}_scale": packed["weight_scale"]}
        else:
            packed = quantize(tensor.bfloat16())
            values[name] = dequantize(packed)
            module = name.removesuffix("weight")
            stored |= {f"{name}_scale": packed.block_scales, f"{module}input_scale": torch.tensor(1.0)}
            if kind == "NVFP4 of ModelOpt":
                stored |= {name: packed.codes, f"{name}_scale_2": packed.global_scale}
            else:
                stored |= {f"{name}_packed": packed.codes, f"{name}_global_scale": 1 / packed.global_scale.reshape(1)}
    save_file(stored, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "some", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    return values


KINDS = [
    "block FP8",
    "FP8 of a tensor",
    "FP8 of rows, [N]",
    "FP8 of rows, [N, 1]",
    "MXFP8",
    "MXFP4 of ModelOpt",
    "MXFP4 of compressed-tensors",
    "NVFP4 of ModelOpt",
    "NVFP4 of compressed-tensors",
]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_the_values(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    values = encode(folder, kind)
    architecture = describe_model(folder)
    check_checkpoint(architecture, folder)
    assert set(Checkpoint(folder).kinds(architecture.tensors)) == {kind.partition(" of")[0]}
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        with SliceReader(folder, rank, ranks) as reader:
            for weight in architecture.stored_weights:
                for part in weight.parts:
                    expected = values[part.name][tuple(slice(*span) for span in part.box(rank, ranks))]
                    # 1 / (1 / scale) may be a neighbour of the scale
                    limit = 1e-2 if kind == "NVFP4 of compressed-tensors" else 0.0
                    torch.testing.assert_close(reader.read(part).float(), expected.float(), rtol=limit, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_within_a_block(kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    values = encode(folder, kind)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    encoding = Checkpoint(folder).encoding(name)
    assert encoding is not None
    for box in (((3, 40), (17, 83)), ((63, 64), (95, 96)), ((0, 64), (0, 1))):
        part = encoding.read(lambda tensor, spans: stored[tensor][tuple(slice(*span) for span in spans)], box)
        expected = values[name][tuple(slice(*span) for span in box)].float()
        torch.testing.assert_close(part.float(), expected, rtol=1e-2 if kind == KINDS[-1] else 0.0, atol=0.0)


@pytest.mark.parametrize("scales", [(2, 2), (3,), (64, 3)])
def test_scales_that_do_not_cover_the_tensor_are_refused(scales: tuple[int, ...], tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    encode(folder, "FP8 of a tensor")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj.weight is stored as F8_E4M3, readable are"):
        check_checkpoint(describe_model(folder), folder)
