"""``python -m tests.golden write|compare|list [case ...]``: results of every case, written once, compared later.

``write`` replaces the named cases in ``fixtures.json``, all without names. ``compare`` says of each what is not equal
bit for bit, and exits with 1 if anything is. Bits depend on the processor and on the versions of libraries: compare
on the machine and with the packages that wrote, which are recorded beside the numbers.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from tests.golden.cases import CASES, Case
from tests.golden.differences import describe
from tests.golden.runs import Outcome, Record, record_cases

FILE = Path(__file__).parent / "fixtures.json"
PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "safetensors", "numpy")


def read_fixtures(file: Path = FILE) -> dict[str, Any]:
    """``written_with`` and ``cases``, by name."""
    return json.loads(file.read_text())


def environment() -> dict[str, str]:
    """What bits may depend on."""
    return {**{name: version(name) for name in PACKAGES}, "cpu": torch.backends.cpu.get_cpu_capability()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("write", "compare", "list"))
    parser.add_argument("cases", nargs="*", help="names or shell patterns, like 'qwen*-tp2-*'; all without")
    parser.add_argument("--plain", action="store_true", help="start each command as users do, by a new Python (slow)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default 2)")
    parser.add_argument("--file", type=Path, default=FILE, help="other fixtures than the repository's")
    parser.add_argument("--keep", type=Path, help="new directory that keeps the runs' files, to look into")
    options = parser.parse_intermixed_args()
    transformers_logging.disable_progress_bar()
    chosen = _chosen(options.cases)
    if options.action == "list":
        print(*(case.name for case in chosen), sep="\n")
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="golden_"))
    folder.mkdir(parents=True, exist_ok=options.keep is None)
    try:
        outcomes = record_cases(chosen, folder, jobs=options.jobs, forked=not options.plain)
        if options.action == "write":
            return _write(outcomes, options.file, complete=not options.cases)
        return _compare(outcomes, read_fixtures(options.file))
    finally:
        if options.keep is None:
            shutil.rmtree(folder)


def _chosen(patterns: list[str]) -> list[Case]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CASES):
            sys.exit(f"no case is called {pattern!r}: python -m tests.golden list")
    return [
        case for name, case in CASES.items() if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _write(outcomes: Iterator[Outcome], file: Path, *, complete: bool) -> int:
    """Put each record into ``file``; 1 if a case failed, whose fixture stays as it was."""
    earlier = read_fixtures(file) if file.exists() else {"written_with": environment(), "cases": {}}
    if not complete and earlier["written_with"] != environment():
        sys.exit(f"fixtures were written with {earlier['written_with']}, here is {environment()}: write all cases")
    cases, failed = earlier["cases"], 0
    for outcome in outcomes:
        if outcome.failure is not None:
            failed += 1
            print(f"{outcome.case.name}: FAILED\n{outcome.failure}", flush=True)
            continue
        cases[outcome.case.name] = outcome.record
        print(f"{outcome.case.name}: written  {outcome.seconds:.0f} s", flush=True)
    file.write_text(_text({name: cases[name] for name in CASES if name in cases}))
    return 1 if failed else 0


def _text(cases: dict[str, Record]) -> str:
    """The file, with one line for each part of a record."""
    lines = ["{", f' "written_with": {json.dumps(environment())},', ' "cases": {']
    for name, record in cases.items():
        parts = [f"   {json.dumps(part)}: {json.dumps(value, separators=(',', ':'))}" for part, value in record.items()]
        lines += [f"  {json.dumps(name)}: {{", ",\n".join(parts), "  },"]
    lines[-1] = lines[-1].rstrip(",")
    return "\n".join([*lines, " }", "}", ""])


def _compare(outcomes: Iterator[Outcome], fixtures: dict[str, Any]) -> int:
    """Print per case whether it is equal, else what differs; 1 if any does."""
    for name, expected in fixtures["written_with"].items():
        if environment()[name] != expected:
            print(f"note: written with {name} {expected}, here is {environment()[name]}")
    count = different = 0
    for outcome in outcomes:
        count += 1
        name, expected = outcome.case.name, fixtures["cases"].get(outcome.case.name)
        lines = [] if expected is None else describe(expected, outcome.record)
        if outcome.failure is not None:
            verdict, lines = "FAILED", [*lines, *outcome.failure.splitlines()]
        elif expected is None:
            verdict = "HAS NO FIXTURE"
        else:
            verdict = "DIFFERS" if lines else "equal bit for bit"
        different += verdict != "equal bit for bit"
        print(f"{name}: {verdict}  {outcome.seconds:.0f} s", *(f"    {line}" for line in lines), sep="\n", flush=True)
    print(f"{count - different} of {count} cases are equal bit for bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
