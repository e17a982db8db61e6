"""The measurements for a GPU, as far as a machine without one can tell: bars, and parts that fail."""

import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu import BARS, PARTS, Bar, rows_of, verdict

MOST = Bar("step", "a ratio", {"part": "step"}, lambda row: row["ratio"], most=1.4)
LEAST = Bar("step", "a rate", {"part": "step"}, lambda row: row["rate"], least=500)
ROWS = [{"part": "loss", "ratio": 9.0}, {"part": "step", "ratio": 1.3, "rate": 499.0}]


def test_bars_look_at_their_row():
    assert verdict(MOST, ROWS) == (True, "met     a ratio: 1.3, at most 1.4")
    assert verdict(LEAST, ROWS) == (False, "missed  a rate: 499, at least 500")
    assert verdict(LEAST, ROWS[:1]) == (False, "missed  a rate: not measured, at least 500")
    assert verdict(LEAST, [{"part": "step"}]) == (False, "missed  a rate: not measured (rate), at least 500")
    assert {bar.part for bar in BARS} <= set(PARTS)


def test_what_a_failed_part_printed_is_kept(monkeypatch):
    program = "import sys, time; print('{\"part\": 1}', flush=True); print('no JSON'); "
    assert rows_of([sys.executable, "-c", program + "sys.exit(3)"]) == ([{"part": 1}], "exit code 3")
    monkeypatch.setattr(gpu, "MINUTES", 0.02)
    assert rows_of([sys.executable, "-c", program + "time.sleep(30)"]) == ([{"part": 1}], "no end after 0.02 minutes")


@pytest.mark.parametrize("missed", [False, True])
def test_the_exit_code_says_whether_a_bar_was_missed(monkeypatch, capsys, missed):
    row = '{"part": "step", "ratio": %s}' % (2 if missed else 1)
    monkeypatch.setattr(gpu, "PARTS", {"step": (sys.executable, "-c", f"print({row!r})")})
    monkeypatch.setattr(gpu, "BARS", (MOST,))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == int(missed)
    assert ("missed" in capsys.readouterr().out) is missed
