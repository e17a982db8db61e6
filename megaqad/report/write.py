"""Write the report: pictures and numbers first, the page last, each complete or not there at all."""

from pathlib import Path

from rich.table import Table

from megaqad.report.page import render_page
from megaqad.report.pictures import draw_pictures
from megaqad.report.results import RunResults, recovery_json
from megaqad.report.verdict import LABEL, entropy, nats, percent, recovered_text
from megaqad.runtime.files import write_bytes_whole, write_text_whole


def write_report(results: RunResults, report_dir: Path) -> None:
    """Write `index.html`, `recovery.json` and the PNG files into `report_dir`, which is made when missing.

    A report that is already there is replaced file by file. Errors: `OSError` when the folder cannot be written.
    """
    pictures = draw_pictures(results)
    page = render_page(results, pictures)
    report_dir.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes_whole(report_dir / f"{picture.name}.png", picture.png)
    write_text_whole(report_dir / "recovery.json", recovery_json(results))
    write_text_whole(report_dir / "index.html", page)


def recovery_table(results: RunResults) -> Table:
    """The columns of `recovery.json` for the terminal, one line per model."""
    tokens = max(column.tokens for column in results.columns.values())
    table = Table(title=f"{results.facts.model}: means over {tokens:,} held-out tokens", title_justify="left")
    table.add_column("")
    for heading in ("KL to teacher", "gap recovered", "cross entropy", "same top token"):
        table.add_column(heading, justify="right")
    for name, column in results.columns.items():
        table.add_row(
            LABEL[name],
            nats(column.kl_to_teacher),
            recovered_text(name, column, results),
            entropy(column.cross_entropy),
            percent(column.top1_agreement),
            style="bold" if name == "qad" else None,
        )
    return table
