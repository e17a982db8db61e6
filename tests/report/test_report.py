"""The page, its numbers and its words: the same numbers everywhere, nothing fetched, nothing hidden."""

import base64
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from megaqad.errors import UserError
from megaqad.report import (
    Curve,
    LayerError,
    StepRow,
    Verification,
    read_curve,
    recovery_json,
    recovery_table,
    write_report,
)
from megaqad.report.layers import layer_grid
from megaqad.report.page import warnings
from megaqad.report.verdict import duration, judge, nats, percent
from tests.report.examples import BF16, FACTS, PTQ, QAD, column, curve, layer_errors, results

PICTURES = {"training_qad", "layer_errors"}
PNG_HEADER = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What the tests ask of a page: its text, its table's values, every reference it makes, balanced tags."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.values: dict[str, dict[str, str]] = {}
        self.shown: dict[str, str] = {}
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.row = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.row = attributes.get("class") or ""
        if "data-key" in attributes:
            self.values.setdefault(self.row, {})[attributes["data-key"]] = attributes["data-value"]
        if tag == "tr" and "data-tokens" in attributes:
            self.values.setdefault(self.row, {})["tokens"] = attributes["data-tokens"]
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open[-1:]):
            self.text.append(data)


def write(folder: Path, **changes) -> tuple[str, Page, dict]:
    write_report(results(**changes), folder)
    source = (folder / "index.html").read_text(encoding="utf-8")
    return source, Page(source), json.loads((folder / "recovery.json").read_text())


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page, dict]:
    """The report of the example's results, in a folder that did not exist."""
    folder = tmp_path_factory.mktemp("run") / "deep" / "report"
    return folder, *write(folder)


def test_all_files_are_written(standard):
    folder = standard[0]
    files = {path.name for path in folder.iterdir()}
    assert files == {"index.html", "recovery.json"} | {f"{name}.png" for name in PICTURES}
    for name in PICTURES:
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(PNG_HEADER)
        assert len(content) > 10_000, "a drawing, not an empty canvas"


def test_recovery_json_has_the_fixed_shape():
    found = json.loads(recovery_json(results()))
    assert list(found) == ["bf16", "ptq", "qat", "qad"]
    assert all(list(row) == ["kl_to_teacher", "cross_entropy", "top1_agreement", "tokens"] for row in found.values())
    assert found["qad"] == asdict(QAD), "full precision"
    assert list(json.loads(recovery_json(results(qat=None)))) == ["bf16", "ptq", "qad"]


def test_the_page_shows_the_numbers_of_the_json(standard):
    _, _, page, found = standard
    assert set(page.values) == set(found)
    for name, row in found.items():
        assert {key: float(value) for key, value in page.values[name].items()} == row
    text = " ".join(page.text)
    for row in found.values():
        assert nats(row["kl_to_teacher"]) in text
        assert percent(row["top1_agreement"]) in text
        assert f"{row['cross_entropy']:.4f}" in text
    assert f"{found['qad']['tokens']:,} held-out tokens, the same for every row" in text


def test_the_page_needs_nothing_else(standard):
    folder, source, page, _ = standard
    assert page.open == [], "every tag is closed"
    drawn = [base64.b64decode(reference.removeprefix("data:image/png;base64,")) for reference in page.references]
    assert set(drawn) == {(folder / f"{name}.png").read_bytes() for name in PICTURES}, (
        "the files' pictures, in the page"
    )
    assert "http" not in source
    assert not re.search(r"@import|url\(", source)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)


def test_every_colour_is_defined(standard):
    source = standard[1]
    assert set(re.findall(r"var\(--(\w+)\)", source)) <= set(re.findall(r"--(\w+):", source))


def test_what_comes_from_outside_is_escaped(tmp_path: Path):
    name = "<b>&\"'</b>$title"
    facts = replace(FACTS, model=name, command=name, verification=Verification(passed=True, summary=name))
    source, page, _ = write(
        tmp_path, facts=facts, layer_errors=(LayerError(module=name, relative_error=0.1, bits=4.5),)
    )
    assert name not in source
    assert "".join(page.text).count(name) == 6, "title, kicker, verification, facts, command, layer"


def test_without_qat_curves_and_layers(tmp_path: Path):
    source, page, found = write(tmp_path, qat=None, qad_curve=Curve(), layer_errors=())
    assert "QAT" not in source
    assert set(page.values) == {"bf16", "ptq", "qad"} == set(found)
    assert page.tags.count("img") == 0


def test_a_report_is_replaced(tmp_path: Path):
    write(tmp_path)
    _, page, found = write(tmp_path, qad=column(0.001, 1.31, 0.99))
    assert found["qad"]["kl_to_teacher"] == 0.001
    assert page.values["qad"]["kl_to_teacher"] == "0.001"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing half-written is left"


@pytest.mark.parametrize("name", ["kl_to_teacher", "cross_entropy", "top1_agreement"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value} is not a number to report"):
        replace(PTQ, **{name: value})


def test_other_refusals():
    with pytest.raises(ValueError, match=r"top1_agreement=93\.9 is no share"):
        column(0.1, 1.0, 93.9)
    with pytest.raises(ValueError, match="tokens=0"):
        column(0.1, 1.0, 0.9, tokens=0)
    with pytest.raises(ValueError, match=r"quantization error of lm_head is nan"):
        LayerError(module="lm_head", relative_error=math.nan, bits=4.5)


@pytest.mark.parametrize(
    ("changes", "headline", "tone"),
    [
        ({"ptq": column(0.02, 1.3, 0.9), "qad": column(0.005, 1.3, 0.9)}, r"recovered 75\.0.% of what", "good"),
        ({"qad": column(0.013, 1.3, 0.9)}, "did not help", "bad"),
        ({"ptq": BF16}, "lost nothing", "neutral"),
        ({"facts": replace(FACTS, verification=Verification(passed=False, summary=""))}, "do not ship", "bad"),
    ],
)
def test_the_verdict_follows_the_numbers(changes: dict, headline: str, tone: str):
    verdict = judge(results(**changes))
    assert re.search(headline, verdict.headline)
    assert verdict.tone == tone


def test_the_share_is_measured_from_the_teacher():
    """A teacher whose own KL is not exactly 0: of a gap of 0.02, half came back."""
    verdict = judge(results(bf16=column(0.01, 1.3, 1.0), ptq=column(0.03, 1.3, 0.9), qad=column(0.02, 1.3, 0.9)))
    assert verdict.share == pytest.approx(0.5)


def test_qat_is_described_as_measured():
    away, closer = judge(results()), judge(results(qat=column(0.009, 1.31, 0.9)))
    assert "drifted away from the teacher: KL 0.02691, 3.1 times QAD's" in away.sentences[2]
    assert "also came closer" in closer.sentences[2]


def test_warnings():
    assert warnings(results()) == []
    uneven = warnings(results(ptq=column(0.01, 1.3, 0.9, tokens=1000)))
    assert len(uneven) == 1
    assert "PTQ 1,000" in uneven[0]
    steps = [replace(row, loss=math.nan) if row.step in (7, 9) else row for row in curve(0.01, 0.005, 20).steps]
    assert warnings(results(qad_curve=Curve(tuple(steps)))) == [
        "2 of 20 QAD steps had a loss or gradient norm that is not finite (the first is step 7)."
    ]


def test_broken_steps_do_not_prevent_the_report(tmp_path: Path):
    rows = tuple(replace(row, loss=math.nan, grad_norm=math.inf) for row in curve(0.01, 0.005, 5).steps)
    source, _, _ = write(tmp_path, qad_curve=Curve(rows))
    assert "5 of 5 QAD steps" in source


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0"), (0.99999, "99.9"), (0.0, "0.0"), (0.00001, "0.1"), (0.57, "57.0"), (-1.1472, "−114.7")],  # noqa: RUF001
)
def test_percent_keeps_all_and_nothing_for_all_and_nothing(share: float, text: str):
    assert percent(share) == f"{text}\N{NO-BREAK SPACE}%"


def test_nats_and_durations():
    assert [nats(value) for value in (0, 3e-8, 1.2345e-5, 0.0125339, 0.1, 12.0)] == [
        *("0", "0", "1.23e-05", "0.01253", "0.1000", "12.00"),
    ]
    spoken = [duration(seconds).replace("\N{NO-BREAK SPACE}", " ") for seconds in (3.21, 48, 161.4, 11_100)]
    assert spoken == ["3.2 s", "48 s", "2 min 41 s", "3 h 05 min"]


def test_the_terminal_table_holds_the_same_numbers():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(recovery_table(results()))
    lines = {line.split()[1]: line for line in console.export_text().splitlines() if line.startswith("│")}
    assert list(lines) == ["BF16", "PTQ", "QAT", "QAD"]
    for text in ("0.008612", "31.3", "1.3220", "95.0"):
        assert text in lines["QAD"]


def test_layers_are_arranged_by_kind_and_depth():
    grid = layer_grid(layer_errors(3))
    assert grid is not None
    assert grid.kinds == ["self_attn.q, k, v", "self_attn.o", "mlp.gate, up", "mlp.down"]
    assert grid.layers == [0, 1, 2]
    assert grid.errors[1, 2] == layer_errors(3)[9].relative_error
    assert not grid.averaged


def test_experts_are_averaged_and_gaps_stay_open():
    rows = [
        LayerError(module=f"model.layers.{layer}.mlp.experts.{expert}.up_proj", relative_error=error, bits=4.5)
        for layer, expert, error in ((2, 0, 0.1), (2, 1, 0.3), (5, 0, 0.5))
    ]
    rows.append(LayerError(module="model.layers.5.mlp.down_proj", relative_error=0.2, bits=4.5))
    grid = layer_grid(rows)
    assert grid is not None
    assert (grid.kinds, grid.layers, grid.averaged) == (["mlp.experts.*.up", "mlp.down"], [2, 5], True)
    assert grid.errors[0].tolist() == pytest.approx([0.2, 0.5])
    assert math.isnan(grid.errors[1, 0])
    assert layer_grid([LayerError(module="lm_head", relative_error=0.0, bits=16)]) is None


def test_metrics_are_read_with_held_out_rows_wherever_they_stand(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    step = {"step": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.1, "tokens": 64, "seconds": 0.2}
    held_out = {"kl_to_teacher": 0.4, "cross_entropy": 1.3, "top1_agreement": 0.9, "tokens": 99}
    rows = [step | {"memory": 3}, step | {"step": 2, "validation": held_out}, {"step": 0, "validation": held_out}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_curve(path)
    assert found.steps == (StepRow(step=1, loss=0.5, grad_norm=0.1), StepRow(step=2, loss=0.5, grad_norm=0.1))
    assert [(row.step, row.kl_to_teacher) for row in found.validation] == [(2, 0.4), (0, 0.4)]
    for broken in ('{"step": 3, "loss": 1}', '{"step": 3, "lo', "3"):
        path.write_text(json.dumps(step) + "\n" + broken + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no row of metrics"):
            read_curve(path)
