"""One picture: drawn by matplotlib in the report's style, kept as a PNG file and put into the page as SVG.

A page must read in light and in dark, and on paper. An SVG inside a page can use the page's own colours, so every
colour drawn here is one of `PALETTE`'s, and `_themed` replaces it in the SVG by the CSS variable of the same name. The
page defines these variables from the same table, for both modes. Text stays text:
sharp, selectable, in the page's font.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

PALETTE = {
    # name: (light, dark); the light ones are what matplotlib draws and what the PNG files show
    "ink": ("#20242b", "#e6e4df"),
    "muted": ("#6a6f78", "#9b9fa8"),
    "rule": ("#d9d7d0", "#383c44"),
    "paper": ("#fdfcf9", "#16181d"),
    "ptq": ("#858b96", "#8b919c"),
    "qat": ("#b8651b", "#e39a55"),
    "qad": ("#0f7568", "#43bfae"),
    "bad": ("#b3261e", "#f2887f"),
}

INK, MUTED, RULE, PAPER = (PALETTE[name][0] for name in ("ink", "muted", "rule", "paper"))

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}

WIDTH, HEIGHT = 4.7, 2.9
"""Inches; the page sets two beside each other."""


@dataclass(frozen=True)
class Picture:
    """name: of the PNG file, which holds its title too. svg: for the page, without title, coloured by CSS variables.
    title, caption: plain text."""

    name: str
    title: str
    png: bytes
    svg: str
    caption: str
    wide: bool = False


def picture(
    name: str,
    title: str,
    draw: Callable[[Figure], None],
    caption: str,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
    wide: bool = False,
) -> Picture:
    """Draw on a figure of its own (no pyplot, no state left behind) and write it in both formats."""
    png, svg = io.BytesIO(), io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        heading = figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(png, format="png", dpi=200, facecolor=PAPER)
        heading.set(visible=False, in_layout=False)  # the page sets it as text that wraps
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Picture(name, title, png.getvalue(), _themed(svg.getvalue(), name), caption, wide)


def _themed(svg: str, name: str) -> str:
    """From a file to an element of the page: no prolog, no namespaces, no metadata, colours by name, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', r'\1 \2 role="img">', body, count=1)
    for reference in (r'\bid="', r"url\(#", r'href="#'):
        body = re.sub(rf"({reference})", rf"\g<1>{name}-", body)
    for color, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{color})")
    return body.strip()
