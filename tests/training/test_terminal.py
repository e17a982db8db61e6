"""What a log says where no progress bar can be drawn, and what no message can do to it."""

import itertools
import time

import pytest

from megaqad.training import logs
from megaqad.training.logs import Terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Three seconds pass between looks at the time."""
    ticks = itertools.count(0.0, 3.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_a_long_task_has_about_a_hundred_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(is_main=True).progress("QAD", 2000) as progress:
        for step in range(1, 2001):
            progress.update(progress.task_ids[0], completed=step, note=f"loss {step}")
    lines = capsys.readouterr().out.splitlines()
    assert 90 <= len(lines) <= 101
    assert any("QAD: 1001 of 2000  loss 1001  0:" in line for line in lines)
    assert lines[-1].endswith("QAD: 2000 of 2000  loss 2000")


@pytest.mark.usefixtures("clock")
def test_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten equal steps half are done: as much time is left as has passed."""
    with Terminal(is_main=True).parts("verify") as tell:
        for step in range(11):
            tell("layers", step, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines, "a part that takes long says so"
    assert all("verify, layers: " in line and line.endswith(" left") for line in lines)
    assert len(lines) <= 10 * 3 * 4 / logs.LINE_SECONDS


def test_a_short_task_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(is_main=True).progress("evaluate PTQ", 2) as progress:
        for _ in range(2):
            progress.update(progress.task_ids[0], advance=1)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("evaluate PTQ: 2 of 2")


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(is_main=True).say("data: /a[/b]/[red]c.txt")
    assert capsys.readouterr().out.endswith("data: /a[/b]/[red]c.txt\n")
