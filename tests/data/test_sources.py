"""Which files are read, in which order, and on which side of the split."""

import json
from pathlib import Path

import pytest

from megaqad.data.settings import DataSettings
from megaqad.data.sources import HELD_OUT_SHARE, SourceFile, find_files, name_share, split_files, stdlib_files
from megaqad.errors import UserError


def write(folder: Path, names: list[str], text: str = "some text\n") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + name, encoding="utf-8")


def names(files: tuple[SourceFile, ...]) -> list[str]:
    return [file.name for file in files]


def test_names_do_not_depend_on_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    some = [f"{part}/{i}.txt" for part in ("a", "b") for i in range(30)]
    for place in ("here", "there/deeper"):
        write(tmp_path / place, some)
    here = find_files([str(tmp_path / "here")], "data.files").files
    there = find_files([str(tmp_path / "there/deeper/**/*.txt")], "data.files").files
    monkeypatch.chdir(tmp_path / "here")
    from_within = find_files(["b", "a", "a/1.txt"], "data.files").files
    assert names(here) == names(there) == names(from_within)
    assert sorted(names(here)) == sorted(some), "each file once"


def test_a_directory_gives_its_text_files_only(tmp_path: Path):
    write(tmp_path, ["a.txt", "deep/b.md", "c.bin", ".git/d.txt", ".hidden.txt"])
    (tmp_path / "settings.JSON").write_text('{"name": "of a package"}')
    (tmp_path / "records.json").write_text('[{"text": "a"}]')
    (tmp_path / "LINES.JSONL").write_text('{"text": "a"}')
    files, left_out = find_files([str(tmp_path)], "data.files")
    assert sorted(names(files)) == ["LINES.JSONL", "a.txt", "deep/b.md", "records.json"]
    assert sorted(path.name for path in left_out) == ["c.bin", "settings.JSON"]
    assert split_files(DataSettings(files=[str(tmp_path)])).left_out == left_out
    explicit = find_files([str(tmp_path / "c.bin")], "data.files")
    assert (names(explicit.files), explicit.left_out) == (["c.bin"], ()), "named explicitly: any ending"


def test_split_by_file(tmp_path: Path):
    write(tmp_path, [f"{i}.txt" for i in range(400)])
    split = split_files(DataSettings(files=[str(tmp_path)]))
    train, held_out = set(names(split.train)), set(names(split.held_out))
    assert not split.by_tail
    assert not train & held_out
    assert len(train | held_out) == 400
    assert held_out == {f"{i}.txt" for i in range(400) if name_share(f"{i}.txt") < HELD_OUT_SHARE}
    assert 8 <= len(held_out) <= 36, "5 % of 400 within 4 standard deviations"


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path: Path):
    write(tmp_path, [f"{i}.txt" for i in range(400)])
    before = split_files(DataSettings(files=[str(tmp_path)]))
    for i in range(100):
        (tmp_path / f"{i}.txt").unlink()
    write(tmp_path, [f"new{i}.txt" for i in range(100)])
    after = split_files(DataSettings(files=[str(tmp_path)]))
    assert set(names(before.train)).isdisjoint(names(after.held_out))
    assert set(names(before.held_out)).isdisjoint(names(after.train))


def test_few_files_are_split_near_their_ends(tmp_path: Path):
    write(tmp_path, ["one.txt", "two.txt"])
    split = split_files(DataSettings(files=[str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]))
    assert split.by_tail
    assert split.train == split.held_out


def test_explicit_validation_files_decide(tmp_path: Path):
    write(tmp_path, ["one.txt", "two.txt"])
    one, two = str(tmp_path / "one.txt"), str(tmp_path / "two.txt")
    split = split_files(DataSettings(files=[one], validation_files=[two]))
    assert (names(split.train), names(split.held_out), split.by_tail) == (["one.txt"], ["two.txt"], False)
    with pytest.raises(UserError, match=r"two\.txt is in data\.files and in data\.validation_files"):
        split_files(DataSettings(files=[str(tmp_path)], validation_files=[two]))


def test_stdlib_leaves_out_what_differs_between_machines():
    found = names(stdlib_files())
    assert {"json/decoder.py", "argparse.py"} <= set(found)
    parts = {part for name in found for part in Path(name).parts}
    assert not parts & {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}
    assert not [name for name in found if "_sysconfigdata" in name]
    assert all(file.content().decode().strip() for file in stdlib_files())
    split = split_files(DataSettings(source="stdlib"))
    assert not set(names(split.train)) & set(names(split.held_out))
    # on any version of Python: these do not move
    assert "argparse.py" in names(split.train)
    assert "traceback.py" in names(split.held_out)


def test_jsonl_holds_a_document_per_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "first\nline"}) + "\n\n" + json.dumps({"text": "zwei ü"}) + "\n", "utf-8")
    assert [text for _, text in SourceFile("a.jsonl", path).documents()] == ["first\nline", "zwei ü"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", r"bad\.jsonl line 2 is not JSON"), ('{"txt": "a"}', "line 2 has no text"), ("3", "line 2 has no text")],
)
def test_bad_records_are_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UserError, match=message):
        list(SourceFile("bad.jsonl", path).documents())


def test_refusals(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.files: no file matches nothing\.txt"):
        find_files(["nothing.txt"], "data.files")
    with pytest.raises(UserError, match=r"data\.files is empty"):
        split_files(DataSettings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty with one of the endings .*\.txt"):
        find_files([str(tmp_path / "empty")], "data.files")
    bad = tmp_path / "latin1.txt"
    bad.write_bytes("Grüße".encode("latin1"))
    with pytest.raises(UserError, match=r"latin1\.txt is not UTF-8 \(byte 0xfc at offset 2\)"):
        list(SourceFile("latin1.txt", bad).documents())
    with pytest.raises(UserError, match="cannot be read"):
        SourceFile("gone.txt", tmp_path / "gone.txt").content()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "txt", "files": ["a"]}, r"data\.source=txt is unknown: choose one of text, stdlib, random"),
        ({"source": "stdlib", "files": ["a"]}, r"data\.files has no effect with data\.source=stdlib"),
        ({"source": "random", "max_train_tokens": -1}, r"data\.max_train_tokens=-1 is negative"),
        ({"source": "random", "max_validation_tokens": -2}, r"data\.max_validation_tokens=-2 is negative"),
    ],
)
def test_settings_refuse_what_makes_no_sense(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        DataSettings(**arguments)
