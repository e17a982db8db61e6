"""The page: the verdict first, then the table, then pictures, then how it was made. One file, nothing fetched.

`page.html` holds the structure and the style with `$name` places (string.Template). Everything that came from outside
is escaped here, where it enters. Each number of the table carries its full value in `data-value`.
"""

import base64
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from megaqad.report.pictures import Picture
from megaqad.report.results import Column, LayerError, RunResults
from megaqad.report.verdict import LABEL, NBSP, Verdict, duration, entropy, judge, nats, percent, recovered_text

MEANING = {
    "bf16": "the teacher",
    "ptq": "quantized, not trained",
    "qat": "trained on the text",
    "qad": "distilled from the teacher",
}


def render_page(results: RunResults, pictures: Sequence[Picture]) -> str:
    """The text of `index.html`."""
    verdict = judge(results)
    template = Template(files("megaqad.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{results.facts.model}: NVFP4 recovery"),
        tone=verdict.tone,
        kicker=f"NVFP4 recovery of <b>{escape(results.facts.model)}</b>",
        headline=_headline(verdict),
        lead="\n".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in verdict.sentences),
        verify=_verification(results),
        warnings="\n".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings(results)),
        table=_table(results),
        pictures="".join(map(_figure, pictures)),
        facts=_facts(results),
        command=escape(results.facts.command),
        layers=_layer_table(results.layer_errors),
    )


def warnings(results: RunResults) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    counts = {LABEL[name]: column.tokens for name, column in results.columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        found.append(f"The rows were measured on different numbers of tokens ({listed}) and cannot be compared.")
    for name, curve in (("QAD", results.qad_curve), ("QAT", results.qat_curve)):
        broken = [row.step for row in curve.steps if not (math.isfinite(row.loss) and math.isfinite(row.grad_norm))]
        if broken:
            found.append(
                f"{len(broken)} of {len(curve.steps)} {name} steps had a loss or gradient norm that is not finite "
                f"(the first is step {broken[0]})."
            )
    return found


def _headline(verdict: Verdict) -> str:
    """The sentence, with its number set off."""
    text = escape(verdict.headline)
    return text if verdict.share is None else text.replace(percent(verdict.share), f"<em>{percent(verdict.share)}</em>")


def _verification(results: RunResults) -> str:
    found = results.facts.verification
    if found is None:
        return '<p class="verify">The export has not been verified.</p>'
    word, kind = ("verified", "verify") if found.passed else ("verification failed", "verify failed")
    return f'<p class="{kind}"><b>Export {word}</b>: {escape(found.summary)}</p>'


def _table(results: RunResults) -> str:
    head = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("", "KL to teacher", "Gap recovered", "Cross entropy", "Same top token")
    )
    rows = "\n".join(_row(name, column, results) for name, column in results.columns.items())
    counts = {column.tokens for column in results.columns.values()}
    tokens = f"{counts.pop():,} held-out tokens, the same" if len(counts) == 1 else "held-out tokens, not the same"
    caption = (
        f"Means over {tokens} for every row, from FP32 logits. KL and cross entropy in nats "
        "per token. Gap: the KL that quantization (PTQ) added."
    )
    return (
        f'<table class="results"><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table>"
    )


def _row(name: str, column: Column, results: RunResults) -> str:
    cells = (
        _cell("kl_to_teacher", column.kl_to_teacher, nats(column.kl_to_teacher)),
        f"<td>{recovered_text(name, column, results)}</td>",
        _cell("cross_entropy", column.cross_entropy, entropy(column.cross_entropy)),
        _cell("top1_agreement", column.top1_agreement, percent(column.top1_agreement)),
    )
    head = f'<th scope="row">{LABEL[name]}<small>{MEANING[name]}</small></th>'
    return f'<tr class="{name}" data-tokens="{column.tokens}">{head}{"".join(cells)}</tr>'


def _cell(key: str, value: float, text: str) -> str:
    return f'<td data-key="{key}" data-value="{value!r}">{text}</td>'


def _figure(picture: Picture) -> str:
    kind = ' class="wide"' if picture.wide else ""
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    image = f'<img alt="{escape(picture.title)}" src="{source}">'
    return (
        f'<figure{kind}><div class="scroll">{image}</div><figcaption>{escape(picture.caption)}</figcaption></figure>\n'
    )


def _facts(results: RunResults) -> str:
    facts = results.facts
    pairs = {
        "Model": f"{facts.model}, {facts.parameters:,} parameters",
        "Data": facts.data,
        "Recipe": facts.recipe,
        "Layout": facts.layout,
        "Training": f"{facts.steps:,} steps, {facts.tokens:,} tokens",
        "Wall time": duration(facts.seconds),
        "Versions": ", ".join(f"{name}{NBSP}{version}" for name, version in facts.versions.items()),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>\n" for name, value in pairs.items() if value)
    return f"<dl>\n{rows}</dl>"


def _layer_table(rows: Sequence[LayerError]) -> str:
    if not rows:
        return ""
    worst_first = sorted(rows, key=lambda row: -row.relative_error)
    body = "\n".join(
        f"<tr><td>{escape(row.module)}</td><td>{row.bits:g}</td><td>{100 * row.relative_error:.2f}{NBSP}%</td></tr>"
        for row in worst_first
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Weight", "Bits", "Error"))
    return (
        f"<details><summary>Relative error of all {len(rows)} weights, worst first</summary>\n"
        f"<table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></details>"
    )
