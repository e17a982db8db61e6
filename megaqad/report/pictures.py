"""The report's pictures: the course of training, and one number for every part of every layer.

What the table says is not drawn again. A picture is a PNG file, drawn by matplotlib in light colours; the page holds
the same file and inverts its lightness on a dark screen.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megaqad.quantization.allocation import GroupKL
from megaqad.report.layers import LayerGrid, grid_of, layer_grid
from megaqad.report.results import Curve, RunResults
from megaqad.report.verdict import nats

INK, MUTED, RULE, PTQ, QAD = "#20242b", "#6a6f78", "#d9d7d0", "#858b96", "#0f7568"
STYLE = {
    "font.size": 9,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
WIDTH, HEIGHT = 4.7, 2.9
"""Inches; the page sets two beside each other."""


@dataclass(frozen=True)
class Picture:
    """name: of the PNG file. title, caption: plain text; the title is in the picture too. wide: fills the page."""

    name: str
    title: str
    png: bytes
    caption: str
    wide: bool = False


def draw_pictures(results: RunResults) -> list[Picture]:
    """All pictures that the results have data for, in the order of the page."""
    pictures = []
    if results.qad_curve.steps:
        pictures.append(_training(results))
    grid = layer_grid(results.layer_errors)
    if grid is not None:
        pictures.append(_errors(grid))
    if results.sensitivity:
        pictures.append(draw_sensitivity(results.sensitivity))
    return pictures


def _picture(
    name: str, title: str, draw: Callable[[Figure], None], caption: str, *, height: float = HEIGHT, wide: bool = False
) -> Picture:
    """Draw on a figure of its own: no pyplot, no state left behind."""
    png = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH if wide else WIDTH, height), layout="constrained")
        draw(figure)
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(png, format="png")
    return Picture(name, title, png.getvalue(), caption, wide)


def _training(results: RunResults) -> Picture:
    curve = results.qad_curve

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        _draw_losses(axes, curve)
        held_out = [(row.step, row.kl_to_teacher) for row in curve.validation]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=QAD, mfc="white", label="held out, on the way")
        for label, column, color in (("PTQ", results.ptq, PTQ), ("QAD", results.qad, QAD)):
            axes.axhline(column.kl_to_teacher, color=color, linewidth=1.1, linestyle="--", label=f"{label}, held out")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2)

    caption = "Thin: every step; thick: running mean. Dashed: means over all held-out tokens, before and after."
    return _picture("training_qad", "KL to the teacher while training, nats per token", draw, caption)


def _draw_losses(axes: Axes, curve: Curve) -> None:
    """Every finite step thin, their centred running mean thick."""
    finite = np.array([(row.step, row.loss) for row in curve.steps if math.isfinite(row.loss)]).reshape(-1, 2)
    steps, losses = finite.T
    axes.plot(steps, losses, color=QAD, linewidth=0.6, alpha=0.45)
    window = max(1, len(losses) // 20)
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid") if len(losses) else losses
    axes.plot(steps[window // 2 :][: len(mean)], mean, color=QAD, linewidth=1.8, label="training batches")


def _errors(grid: LayerGrid) -> Picture:
    low, high = 100 * float(np.nanmin(grid.errors)), 100 * float(np.nanmax(grid.errors))
    experts = " Experts of a layer are averaged." if grid.averaged else ""
    caption = f"|Q(W) - W| / |W|, from {low:.2f} % to {high:.2f} %; stronger colour is more.{experts}"
    title = "Relative error of each quantized weight, %"
    return _heat("layer_errors", title, grid, lambda error: f"{100 * error:.2f}", caption)


def draw_sensitivity(groups: Sequence[GroupKL]) -> Picture:
    """What quantizing each layer group alone costs, in units that leave short numbers.

    Groups outside the layers (the head) are named in the caption; at least one must be in a layer.
    """
    grid = grid_of([(group.group, group.kl_to_teacher) for group in groups])
    assert grid is not None, "a recipe quantizes some layer"
    worst = max(groups, key=lambda group: group.kl_to_teacher)
    unit = 10.0 ** (math.floor(math.log10(worst.kl_to_teacher)) if worst.kl_to_teacher > 0 else 0)
    head = "".join(f" {group.group}: {nats(group.kl_to_teacher)}." for group in groups if "." not in group.group)
    caption = (
        "Attention or MLP of one layer quantized, all else BF16; stronger colour is more. "
        f"Most: {worst.group}, {nats(worst.kl_to_teacher)}.{head}"
    )
    title = f"KL to the teacher of each part alone, in {unit:g} nats per token"
    return _heat("layer_sensitivity", title, grid, lambda kl: f"{kl / unit:.1f}", caption)


def _heat(name: str, title: str, grid: LayerGrid, label: Callable[[float], str], caption: str) -> Picture:
    """One row per kind of part, one column per layer; the values are written into the cells where they fit."""
    rows, columns = grid.errors.shape
    colors = mpl.colors.LinearSegmentedColormap.from_list("heat", ["#e8f1f0", "#86c1b9"])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="layer")
        axes.pcolormesh(grid.errors, cmap=colors, edgecolors="white", linewidth=2)
        if columns <= 16:
            for (row, column), value in np.ndenumerate(grid.errors):
                if not math.isnan(value):
                    axes.text(column + 0.5, row + 0.5, label(value), ha="center", va="center", fontsize=8.5)
        every = max(1, columns // 16)
        axes.set_yticks(np.arange(rows) + 0.5, grid.kinds, color=INK)
        axes.set_xticks(np.arange(0, columns, every) + 0.5, [str(layer) for layer in grid.layers[::every]])
        axes.invert_yaxis()
        axes.spines[["left", "bottom"]].set_visible(False)

    return _picture(name, title, draw, caption, height=0.9 + 0.34 * rows, wide=columns > 12)
