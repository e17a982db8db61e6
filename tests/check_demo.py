"""Check a finished demo run against what the README promises: ``python tests/check_demo.py runs/demo``."""

import json
import sys
from pathlib import Path


def problems(run_dir: Path) -> list[str]:
    """What the run falls short of; empty when it keeps every promise."""
    columns = json.loads((run_dir / "report" / "recovery.json").read_text())
    ptq, qat, qad = columns["ptq"], columns["qat"], columns["qad"]
    verified = json.loads((run_dir / "verify.json").read_text())
    checks = {
        "QAD's KL is at most 0.75 of PTQ's": qad["kl_to_teacher"] <= 0.75 * ptq["kl_to_teacher"],
        "QAT's KL is above PTQ's": qat["kl_to_teacher"] > ptq["kl_to_teacher"],
        "QAD's cross entropy is no higher than PTQ's": qad["cross_entropy"] <= ptq["cross_entropy"],
        "all columns have the same tokens, 50,000 or more": len({column["tokens"] for column in columns.values()}) == 1
        and ptq["tokens"] >= 50_000,
        "the export is verified": verified["passed"],
        "the page exists": (run_dir / "report" / "index.html").is_file(),
    }
    return [name for name, kept in checks.items() if not kept]


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    for problem in found:
        print(f"not so: {problem}", file=sys.stderr)
    sys.exit(1 if found else 0)
