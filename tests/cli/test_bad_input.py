"""What a user can get wrong: one line that names the value and the way out, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megaqad.cli import main
from megaqad.config import load_settings
from megaqad.runtime import launch
from tests.models.checkpoints import make_checkpoint
from tests.overrides import merged

TRAIN = ["data=random", "train.global_batch_size=4", "train.sequence_length=32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def changed(model, tmp_path):
    """A copy of the model with another config.json."""

    def copy(**settings):
        folder = shutil.copytree(model, tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return copy


def refusal(capsys, arguments):
    """Run the command here; the single line it refuses with."""
    code = main(merged(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("megaqad: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=3"], ["parallel.tensor=3", "hidden_size=64", "choose a divisor"]),
        (["parallel.tensor=8"], ["parallel.tensor=8", "4 attention heads", "choose one of 1, 2, 4"]),
        (["parallel.pipeline=5"], ["parallel.pipeline=5", "4 layers", "choose fewer stages"]),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], ["virtual_pipeline=3", "choose fewer stages"]),
        (["parallel.virtual_pipeline=2"], ["virtual_pipeline=2", "parallel.pipeline=2 or more"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=4"],
            ["1 microbatches", "multiple of 8"],
        ),
        (["parallel.sequence=true"], ["parallel.sequence", "parallel.tensor above 1"]),
        (["parallel.context=2"], ["parallel.context=2", "parallel.context=1"]),
        (["train.global_batch_size=5", "train.micro_batch_size=2"], ["global_batch_size=5", "multiple of 2"]),
        (["train.global_batch_size=5", "parallel.data=2"], ["global_batch_size=5", "2 data-parallel", "multiple of 2"]),
        (["train.sequence_length=4096"], ["sequence_length=4096", "max_position_embeddings=128"]),
        (["train.steps=0"], ["train.steps=0", "1 or more"]),
        (["train.lr=1e-5", "train.min_lr=1e-4"], ["min_lr=0.0001", "train.lr=1e-05"]),
        (["train.lr=fast"], ["fast", "Float"]),
        (["train.speed=9"], ["speed"]),
        (["quantization=nvfp5"], ["nvfp5", "nvfp4_weight_only"]),
        (["quantization.exclude=[lm_head,'*.self_atn.*']"], ["'*.self_atn.*'", "matches no linear module"]),
        (["quantization.exclude=[lm_head,'*.q_proj']"], ["k_proj", "q_proj", "alike"]),
        (["quantization=nvfp4_weght_only"], ["did you mean nvfp4_weight_only?"]),
        (["quantization=general/ptq/nvfp4_default-kv_fp", "seed=1"], ["did you mean general/ptq/nvfp4_default-kv_fp8"]),
        (
            ["quantization=general/ptq/nvfp4_default-kv_fp8", "quantization.kv_cache=none"],
            ["quantization.kv_cache=none beside"],
        ),
        (["quantization.formats={*.mlp.*:fp9}"], ["fp9", "did you mean fp8?"]),
        (["quantization.kv_cache=int8"], ["kv_cache=int8", "none, fp8, nvfp4"]),
        (["export.format=gguf"], ["export.format=gguf", "modelopt, compressed_tensors"]),
        (["verify.model=half"], ["verify.model=half", "auto, full, streamed, files, off"]),
        (
            ["export.format=compressed_tensors", "quantization.activation_scales=dynamic"],
            ["quantization.activation_scales=dynamic", "set static, or export.format=modelopt"],
        ),
        (["quantization=mxfp4", "parallel.tensor=2"], ["o_proj sums over 48 inputs", "on_misfit=keep"]),
        (["quantization.include=[lm_head]"], ["both list 'lm_head'"]),
        (["quantization.exclude=['*']"], ["quantizes no module"]),
        (["quantization.activations=fp3"], ["quantization.activations=fp3", "nvfp4"]),
        (["distill.objective=sft"], ["distill.objective=sft", "qad, qat"]),
        (["distill.loss={forward:1}"], ["distill.loss has forward", "forward_kl, reverse_kl, jsd, logit_mse"]),
        (["distill.loss={forward_kl:1,jsd:-0.5}"], ["distill.loss.jsd=-0.5", "from 0 up"]),
        (["distill.loss={forward_kl:nan}"], ["distill.loss.forward_kl=nan"]),
        (["distill.loss={forward_kl:0}"], ["no part with a weight above 0"]),
        (["distill.loss={forward_kl:1}", "distill.objective=qat"], ["no effect", "qat"]),
        (["distill.temperature=0"], ["distill.temperature=0.0"]),
        (["distill.beta=1"], ["distill.beta=1.0", "between 0 and 1"]),
        (["distill.hidden.kind=l2"], ["distill.hidden.kind=l2", "cosine, cka"]),
        (["distill.hidden.weight=1", "distill.hidden.layers=[4]"], ["distill.hidden.layers has 4", "0 to 3"]),
        (["distill.hidden.weight=1", "distill.cache=/tmp/none"], ["distill.cache holds last hidden states only"]),
        (["distill.teacher=self", "distill.cache=/tmp/none"], ["distill.teacher=self"]),
        (["distill.teacher=self"], ["train.trainable=['*'] is every weight", "distill.teacher=model"]),
        (["train.teacher_micro_batch_size=3", "train.micro_batch_size=2"], ["teacher_micro_batch_size=3", "multiple"]),
        (
            ["train.teacher_micro_batch_size=2", "distill.hidden.weight=1"],
            ["teacher_micro_batch_size=2", "leave it out"],
        ),
        (["distill.teacher=/no/teacher"], ["/no/teacher/config.json does not exist"]),
        (["runtime.dtype=float16"], ["runtime.dtype=float16", "bfloat16, float32"]),
        (["data=/does/not/exist.txt"], ["/does/not/exist.txt"]),
    ],
)
def test_settings_are_refused(capsys, model, tmp_path, overrides, said):
    output = tmp_path / "run"
    line = refusal(capsys, ["distill", f"model={model}", f"output_dir={output}", *TRAIN, *overrides])
    for words in said:
        assert words in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/x"], "--model is no setting: settings are written key=value, like model=/x"),
        (["--model=/x"], "--model=/x is no setting: settings are written key=value, like model=/x"),
        (["model"], "like model=<value>"),
        (["-v", "seed=1"], "like v=<value>"),
        (["data=a", "data=b"], "data is given twice, data=a and data=b: leave one of them out"),
        (["seed=1", "+seed=2"], "seed is given twice"),
        (["quantization.exclude=lm_head"], "this setting is a list, written quantization.exclude=[lm_head]"),
        (["quantization.formats=fp8"], "this setting is a mapping, written quantization.formats={name: value}"),
        (["distill.loss=forward_kl"], "this setting is a mapping, written distill.loss={name: value}"),
        (["parallel=2"], "parallel is a group of settings, given one by one: parallel.tensor, parallel.pipeline"),
        (["train.lr=1e-4,1e-5"], "takes one value; launch/sweep.sh runs a command for each of several"),
        (["train.lr=(("], "train.lr=(( cannot be read: a value with other signs is quoted"),
        (["data=a.txt,b.txt", *TRAIN[1:]], "no file matches a.txt,b.txt"),
        (["data=a.txt,b.txt", *TRAIN[1:]], "several are written data.files=[a.txt,b.txt]"),
    ],
)
def test_the_right_form_is_shown(capsys, model, tmp_path, arguments, said):
    code = main(
        ["distill", f"output_dir={tmp_path / 'run'}", *([f"model={model}"] * ("model" not in arguments[0])), *arguments]
    )
    [line] = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert said in line


def test_home_directories_are_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("model", "output_dir", "tokens", "student", "distill.teacher", "distill.cache")
    settings = load_settings([f"{key}=~/{key}" for key in keys])
    found = (settings.model, settings.output_dir, settings.tokens, settings.student)
    assert (*found, settings.distill.teacher, settings.distill.cache) == tuple(str(tmp_path / key) for key in keys)
    (tmp_path / "recipe.yaml").write_text("weights: fp8\nactivations: fp8\n")
    assert load_settings(["quantization=~/recipe.yaml"]).quantization.weights == "fp8"


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"vocab_size": 516}, [], ["vocab_size=516", "the student 515", "add the files"]),
        ({"hidden_size": 96}, ["distill.hidden.weight=1"], ["has 96 and the student 64", "use cka"]),
        ({"num_hidden_layers": 2}, ["parallel.pipeline=4"], ["parallel.pipeline=4", "2 layers"]),
        ({"intermediate_size": 81}, ["parallel.tensor=2"], ["parallel.tensor=2", "81"]),
    ],
)
def test_teachers_are_refused(capsys, model, tmp_path, changes, overrides, said):
    teacher = make_checkpoint("llama", tmp_path / "teacher", **changes)
    capsys.readouterr()
    arguments = [f"model={model}", f"output_dir={tmp_path / 'run'}", f"distill.teacher={teacher}", *TRAIN]
    line = refusal(capsys, ["distill", *arguments, *overrides])
    for words in said:
        assert words in line
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_tokens_is_refused(capsys, changed, model, tmp_path):
    teacher = changed()
    student = shutil.copytree(model, tmp_path / "student")
    for folder, second in ((student, "b"), (teacher, "c")):
        vocabulary = {"model": {"vocab": {"a": 0, second: 1}}, "added_tokens": [{"content": "<end>", "id": 2}]}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    arguments = [f"model={student}", f"output_dir={tmp_path / 'run'}", f"distill.teacher={teacher}", *TRAIN]
    assert "id 1 is 'c' there and 'b' for the student" in refusal(capsys, ["distill", *arguments])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"vocab_size": 600}, ["515 rows", "vocab_size=600"]),
        ({"num_hidden_layers": 5}, ["lacks", "model.layers.4"]),
        ({"num_hidden_layers": 3}, ["model.layers.3"]),
        ({"intermediate_size": 90}, ["gate_proj", "[90, 64]"]),
    ],
)
def test_models_are_refused(capsys, changed, tmp_path, settings, said):
    output = tmp_path / "run"
    line = refusal(capsys, ["distill", f"model={changed(**settings)}", f"output_dir={output}", *TRAIN])
    for words in said:
        assert words in line
    assert not output.exists()


def test_a_cache_that_the_layout_has_no_words_for_is_refused(capsys, tmp_path):
    folder = make_checkpoint("qwen3", tmp_path / "model")
    capsys.readouterr()  # transformers' progress bars
    settings = ["export.format=compressed_tensors", "quantization.kv_cache=nvfp4_cast"]
    line = refusal(capsys, ["export", f"model={folder}", f"output_dir={tmp_path / 'run'}", *settings])
    assert "no quantization.kv_cache=nvfp4_cast: set quantization.kv_cache=fp8_cast, or export.format=modelopt" in line


def test_a_truncated_file_is_refused(capsys, changed, tmp_path):
    folder = changed()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refusal(capsys, ["distill", f"model={folder}", f"output_dir={tmp_path / 'run'}", *TRAIN])
    assert "model.safetensors" in line
    assert not (tmp_path / "run").exists()


def test_missing_things_are_named(capsys, model, tmp_path):
    assert "choose one of demo" in refusal(capsys, ["destill"])
    assert "model is not set" in refusal(capsys, ["distill", "output_dir=x"])
    assert "output_dir is not set" in refusal(capsys, ["distill", f"model={model}"])
    assert "data is not set" in refusal(capsys, ["distill", f"model={model}", f"output_dir={tmp_path / 'run'}"])
    assert "config.json does not exist" in refusal(capsys, ["distill", "model=/no/model", "output_dir=x", *TRAIN])


def test_anothers_output_dir_is_left_alone(capsys, model, tmp_path):
    output = tmp_path / "theirs"
    output.mkdir()
    (output / "thesis.txt").write_text("do not lose me")
    line = refusal(capsys, ["distill", f"model={model}", f"output_dir={output}", *TRAIN])
    assert "not empty" in line
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_another_runs_output_dir_is_left_alone(capsys, model, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    recorded = {"seed": 1}
    (output / "run.json").write_text(json.dumps(recorded))
    line = refusal(capsys, ["distill", f"model={model}", f"output_dir={output}", *TRAIN, "seed=2"])
    assert "seed=1" in line
    assert json.loads((output / "run.json").read_text()) == recorded


@pytest.mark.parametrize("command", ["evaluate", "export", "verify", "logits"])
def test_a_student_is_not_read_under_another_recipe(capsys, model, tmp_path, command):
    output = tmp_path / "run"
    output.mkdir()
    (output / "run.json").write_text(json.dumps({"quantization.activations": "none"}))
    settings = [f"model={model}", f"output_dir={output}", "data=stdlib", "tokens=no.npy", "train.sequence_length=64"]
    line = refusal(capsys, [command, *settings])
    assert "quantization.activations=none, this one has nvfp4" in line


@pytest.fixture
def no_ranks(monkeypatch):
    """Fails the test when the command starts ranks."""
    monkeypatch.setattr(launch, "run_ranks_here", lambda *_: pytest.fail("ranks were started"))


@pytest.mark.parametrize("command", ["recover", "quantize", "distill", "evaluate", "pretrain", "bench step"])
@pytest.mark.parametrize(
    ("content", "said"), [(b"", "no text"), (b"caf\xe9 " * 100, "UTF-8"), (b"a text too short", "held-out data")]
)
@pytest.mark.usefixtures("no_ranks")
def test_bad_text_is_refused_before_ranks_are_started(capsys, tmp_path, command, content, said):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    output = tmp_path / "run"
    sizes = [*TRAIN[1:], "train.micro_batch_size=2", "parallel.data=1", "parallel.tensor=2"]
    arguments = ["model=bundled", f"output_dir={output}", f"data={text}", *sizes]
    assert said in refusal(capsys, [*command.split(), *arguments])
    assert not output.exists()


@pytest.mark.parametrize(
    ("tokens", "overrides", "said"),
    [
        (None, [], "tokens is not set"),
        ("missing", [], "does not exist"),
        (b"no array", [], "is no .npy file of numbers"),
        (np.zeros((2, 4)), [], "dtype float64"),
        (np.full((2, 4), 515), [], "holds ids from 515 to 515: the vocabulary has 0 to 514"),
        (np.zeros((2, 5), dtype=np.int64), ["parallel.sequence=true"], "5 long, which does not divide"),
    ],
)
@pytest.mark.usefixtures("no_ranks")
def test_bad_tokens_are_refused_before_ranks_are_started(capsys, model, tmp_path, tokens, overrides, said):
    path = tmp_path / "tokens.npy"
    if isinstance(tokens, bytes):
        path.write_bytes(tokens)
    elif isinstance(tokens, np.ndarray):
        np.save(path, tokens)
    given = [f"tokens={path}"] if tokens is not None else []
    arguments = [f"model={model}", f"output_dir={tmp_path / 'run'}", "parallel.tensor=2", *given, *overrides]
    assert said in refusal(capsys, ["logits", *arguments])


def test_a_missing_text_is_refused_before_ranks_join(model, tmp_path):
    """As under torchrun or srun: the other rank and the rendezvous are not there, so joining would fail or hang."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = ["distill", f"model={model}", f"output_dir={tmp_path / 'run'}", "data=/no/text", *TRAIN[1:]]
    ran = subprocess.run(
        [sys.executable, "-m", "megaqad", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    )
    assert ran.returncode == 2, ran.stderr
    [line] = ran.stderr.strip().splitlines()
    assert "no file matches /no/text" in line
    assert not (tmp_path / "run").exists()
