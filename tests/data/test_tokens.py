"""From text on disk to datasets: the cache, the demo's tokenizer, and every refusal on the way."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megaqad.data import DataSettings, build_datasets, prepare_tokens, tokens
from megaqad.data.sources import split_files
from megaqad.data.tokens import load_tokenizer, text_tokens
from megaqad.errors import StoppedEarly, UserError

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "megaqad" / "assets" / "teacher"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGAQAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text, grün\n" for i in range(400)), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model's folder, to break."""
    return Path(shutil.copytree(TEACHER, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def build(path: Path | None = None, model_dir: Path = TEACHER, length: int = 16, seed: int = 1, **more):
    settings = DataSettings(files=[str(path)], **more) if path else DataSettings(**more)
    return build_datasets(settings, model_dir=model_dir, sequence_length=length, seed=seed)


tokenizer = load_tokenizer(TEACHER)


@given(st.text(max_size=200))
def test_the_demo_tokenizer_loses_nothing(text: str):
    assert tokenizer.decode(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]) == text


def test_the_demo_tokenizer_fits_the_demo_model():
    config = json.loads((TEACHER / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == 2048
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == config["eos_token_id"] == config["bos_token_id"] == tokenizer.pad_token_id


def test_the_standard_library_is_enough():
    data = build(source="stdlib", length=256)
    assert len(data.validation.tokens) >= 50_000
    assert len(data.train.tokens) >= 20 * 50_000
    assert data.facts.largest_token < 2048
    assert 2.5 < data.facts.train_bytes / data.facts.train_tokens < 3.5


def test_one_file_trains_on_its_head_and_holds_out_its_tail(text: Path):
    data = build(text)
    whole = torch.cat([data.train.tokens, data.validation.tokens]).tolist()
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[:-1]) == text.read_text(encoding="utf-8")
    assert len(data.validation.tokens) == round(0.05 * len(whole))
    assert data.facts.train_tokens == len(data.train.tokens)


def test_documents_end_with_the_end_token(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name} text", encoding="utf-8")
    (tmp_path / "v.jsonl").write_text('{"text": "eins"}\n{"text": "zwei"}\n')
    settings = DataSettings(
        files=[str(tmp_path / "a"), str(tmp_path / "b")], validation_files=[str(tmp_path / "v.jsonl")]
    )
    arrays = text_tokens(split_files(settings), TEACHER)
    assert sorted(tokenizer.decode(arrays.train).split("<|endoftext|>")) == ["", "a text", "b text"]
    assert tokenizer.decode(arrays.validation) == "eins<|endoftext|>zwei<|endoftext|>"


def test_documents_begin_as_the_tokenizer_begins_them(model: Path, tmp_path: Path):
    """Engines put it before every prompt; a text that has it already, or that ends in the end token, gets no second."""
    path = model / "tokenizer.json"
    fast = Tokenizer.from_file(str(path))
    begin, end = fast.token_to_id("!"), tokenizer.eos_token_id
    fast.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    fast.save(str(path))
    texts = ["one", "!two", "three<|endoftext|>", "<|endoftext|>"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("words, many of them")
    split = split_files(DataSettings(files=[str(file)], validation_files=[str(held_out)]))
    arrays = text_tokens(split, model)
    documents = [
        *([begin, *fast.encode("one", add_special_tokens=False).ids, end]),
        *([*fast.encode("!two", add_special_tokens=False).ids, end]),
        *([begin, *fast.encode("three", add_special_tokens=False).ids, end]),
        *([begin, end]),
    ]
    assert arrays.train.tolist() == documents
    assert arrays.facts.beginning == "!"
    assert text_tokens(split, TEACHER).facts.beginning == ""


def test_a_sentencepiece_model_is_enough(tmp_path: Path):
    """A checkpoint may bring a tokenizer.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "README.md"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2},
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    loaded = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert loaded(["Some words"], add_special_tokens=False)["input_ids"] == [model.encode("Some words")]
    assert tokens.beginning(loaded) == [1]


def test_a_tokenizer_with_code_of_its_own_asks_nothing(model: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would ask on the terminal whether to run it, which hangs a job."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    path = model / "tokenizer_config.json"
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (model / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match=r"is code of its own \(auto_map in tokenizer_config.json\), which is not run"):
        load_tokenizer(model)


def test_text_that_cannot_be_tokenized_is_named(text: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(texts: list[str], **_: object) -> dict:
        if texts == ["a"]:
            return {"input_ids": [[1]]}
        raise RuntimeError("no such piece")

    monkeypatch.setattr(tokens, "load_tokenizer", lambda _: fail)
    with pytest.raises(UserError, match=r"text\.txt cannot be tokenized \(no such piece\): leave it out"):
        build(text)


def test_a_long_document_is_cut_at_line_ends_only(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = build(text).train.tokens
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 1000)
    monkeypatch.setenv("MEGAQAD_CACHE", str(tmp_path / "other"))
    assert torch.equal(build(text).train.tokens, whole)


def test_the_cache_is_used_and_misses_on_any_change(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def folders() -> list[str]:
        return sorted(path.name for path in (cache / "tokens").iterdir())

    prepare_tokens(DataSettings(files=[str(text)]), model_dir=TEACHER)
    first = folders()
    assert len(first) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "load_tokenizer", lambda _: pytest.fail("tokenized again"))
        before = build(text)
        assert build(text, seed=2, length=8).train.tokens.equal(before.train.tokens), "seed and length do not matter"
    content, times = text.read_bytes(), text.stat()
    text.write_bytes(content.replace(b"line 7 ", b"line 8 "))
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same date: only the content tells
    after = build(text)
    assert len(folders()) == 2
    assert not after.train.tokens.equal(before.train.tokens)
    assert after.train.fingerprint() != before.train.fingerprint()
    assert folders()[0][0] != ".", "nothing unfinished is left"


def test_another_tokenizer_is_another_cache(text: Path, model: Path, cache: Path):
    build(text)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 2048}))
    build(text, model_dir=model)
    assert len(list((cache / "tokens").iterdir())) == 2


def test_two_writers_at_once(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The second finds the folder in place when it wants to rename its own: it drops it and reads the first's."""
    real = tokens._tokenize

    def slow(*arguments):
        result = real(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "_tokenize", real)
            build(text)
        return result

    monkeypatch.setattr(tokens, "_tokenize", slow)
    data = build(text)
    assert len(list((cache / "tokens").iterdir())) == 1
    assert tokenizer.decode(data.train.tokens[:3].tolist()).startswith("line")


def test_limits_cut_the_tokens(text: Path):
    data = build(text, max_train_tokens=100, max_validation_tokens=40)
    assert len(data.train.tokens) == 100
    batches = data.validation.evaluation_batches(2, 0, 1)
    assert sum(batch.weights.sum().item() for batch in batches) == 40


def test_random_tokens_are_uniform_seeded_and_need_no_tokenizer(tmp_path: Path, cache: Path):
    (tmp_path / "config.json").write_text('{"vocab_size": 48}')
    data = build(model_dir=tmp_path, source="random", max_train_tokens=48_000)
    counts = np.bincount(data.train.tokens.numpy(), minlength=48)
    assert len(counts) == 48
    assert ((counts > 1000 - 160) & (counts < 1000 + 160)).all(), "five standard deviations"
    again = build(model_dir=tmp_path, source="random", max_train_tokens=48_000)
    other = build(model_dir=tmp_path, source="random", max_train_tokens=48_000, seed=2)
    assert data.train.tokens.equal(again.train.tokens)
    assert data.train.fingerprint() == again.train.fingerprint()
    assert not data.train.tokens.equal(other.train.tokens)
    assert not cache.exists()


def test_random_tokens_measured_on_text(text: Path):
    data = build(source="random", validation_files=[str(text)])
    assert tokenizer.decode(data.validation.tokens.tolist()) == text.read_text("utf-8") + "<|endoftext|>"


@pytest.mark.parametrize("source", ["text", "stdlib", "random"])
def test_config_files_repeat_the_defaults(source: str):
    content = yaml.safe_load((ROOT / "conf" / "data" / f"{source}.yaml").read_text())
    expected = vars(DataSettings(source="random")) | {"source": source}
    assert content == expected


def test_refusals(text: Path, model: Path, tmp_path: Path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match=r"no text for the training data in .*empty\.txt: give more"):
        build(empty)
    with pytest.raises(UserError, match=r"no text for the held-out data in .*empty\.txt"):
        build(text, validation_files=[str(empty)])
    with pytest.raises(UserError, match=r"fewer than one sequence needs \(100000 \+ 1\)"):
        build(text, length=100_000)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"gave token \d+, but config.json has vocab_size=100"):
        build(text, model_dir=model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "has no vocab_size"),
        ("{}", "has no vocab_size"),
        ('{"vocab_size": 0}', "has vocab_size=0"),
    ],
)
def test_a_model_without_vocabulary_is_refused(text: Path, model: Path, content: str | None, message: str):
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build(text, model_dir=model)


def test_a_missing_or_broken_tokenizer_is_refused(text: Path, model: Path):
    (model / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded"):
        build(text, model_dir=model)
    shutil.copy(TEACHER / "tokenizer.json", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no end token"):
        build(text, model_dir=model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        build(text, model_dir=model)


def test_a_stop_request_while_the_tokenizer_loads_is_no_tokenizer_error(monkeypatch: pytest.MonkeyPatch):
    def stopped(*args: object, **kwargs: object) -> None:
        raise StoppedEarly("SIGTERM")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stopped)
    with pytest.raises(StoppedEarly, match="SIGTERM"):
        load_tokenizer(TEACHER)


def test_an_unwritable_cache_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGAQAD_CACHE", str(text / "below a file"))
    with pytest.raises(UserError, match=r"token cache .* cannot be written .*: set MEGAQAD_CACHE"):
        build(text)
