"""The report's pictures: each says one thing, carries its labels beside the marks, and is narrow enough for a
telephone. ``canvas.py`` gives them their style and their files."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from megaqad.quantization.allocation import GroupKL
from megaqad.report.canvas import INK, MUTED, PALETTE, PAPER, WIDTH, Picture, picture
from megaqad.report.layers import LayerGrid, grid_of, layer_grid
from megaqad.report.results import Column, Curve, RunResults
from megaqad.report.verdict import MINUS, entropy, nats

COLOR = {name: PALETTE[name][0] for name in ("ptq", "qat", "qad")}
LABEL = {"bf16": "BF16", "ptq": "PTQ", "qat": "QAT", "qad": "QAD"}


def draw_pictures(results: RunResults) -> list[Picture]:
    """All pictures that the results have data for, in the order of the page."""
    pictures = [_recovery_kl(results), _recovery_text(results)]
    if results.qad_curve.steps:
        pictures.append(_qad_curve(results))
    if results.qat is not None and results.qat_curve.steps:
        pictures.append(_qat_curve(results, results.qat))
    if results.qad_curve.steps:
        pictures.append(_optimizer(results))
    grid = layer_grid(results.layer_errors)
    if grid is not None:
        pictures.append(_layers(grid))
    if results.sensitivity:
        pictures.append(draw_sensitivity(results.sensitivity))
    return pictures


def _recovery_kl(results: RunResults) -> Picture:
    columns = {name: column for name, column in results.columns.items() if name != "bf16"}

    def draw(figure: Figure) -> None:
        _bars(figure.add_subplot(), columns, [column.kl_to_teacher for column in columns.values()], nats)

    caption = "Distance from the BF16 teacher, which is at 0. Shorter is better."
    return picture("recovery", "KL to the teacher, nats per token", draw, caption, height=_bars_height(columns))


def _recovery_text(results: RunResults) -> Picture:
    columns = {name: column for name, column in results.columns.items() if name != "bf16"}
    teacher = results.bf16.cross_entropy

    def draw(figure: Figure) -> None:
        values = [column.cross_entropy - teacher for column in columns.values()]
        _bars(figure.add_subplot(), columns, values, lambda value: f"{value:+.4f}".replace("-", MINUS))

    title = "Cross entropy minus the teacher's, nats per token"
    caption = (
        f"The teacher's is {entropy(teacher)}. A model can score the text as well as the teacher and still answer "
        "differently; only the KL sees that."
    )
    return picture("recovery_cross_entropy", title, draw, caption, height=_bars_height(columns))


def _bars_height(columns: dict[str, Column]) -> float:
    return 0.45 + 0.42 * len(columns)


def _bars(axes: Axes, columns: dict[str, Column], values: Sequence[float], label: Callable[[float], str]) -> None:
    """Horizontal bars with their values written beside them; no axis is needed then."""
    rows = range(len(values))
    axes.barh(rows, values, height=0.62, color=[COLOR[name] for name in columns])
    axes.set_yticks(rows, [LABEL[name] for name in columns])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9.5, pad=6)
    axes.invert_yaxis()
    low, high = min(0.0, *values), max(0.0, *values)
    room = (high - low) or 1.0
    axes.set_xlim(low - (0.24 * room if low < 0 else 0), high + 0.24 * room)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for row, value in zip(rows, values, strict=True):
        side = -1 if value < 0 else 1
        axes.text(
            value + side * 0.02 * room, row, label(value), ha="left" if side > 0 else "right", va="center", fontsize=9.5
        )
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _qad_curve(results: RunResults) -> Picture:
    curve = results.qad_curve

    def draw(figure: Figure) -> None:
        axes = _over_steps(figure)
        _course(axes, curve, COLOR["qad"], "training batches")
        _level(axes, results.ptq.kl_to_teacher, COLOR["ptq"], "PTQ, held out")
        _held_out(axes, [(row.step, row.kl_to_teacher) for row in curve.validation], COLOR["qad"])
        _level(axes, results.qad.kl_to_teacher, COLOR["qad"], "QAD, held out")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2)

    caption = "Thin: every step; thick: running mean. Dashed: means over all held-out tokens, before and after."
    return picture("training_qad", "QAD: KL to the teacher while training", draw, caption)


def _qat_curve(results: RunResults, qat: Column) -> Picture:
    curve = results.qat_curve

    def draw(figure: Figure) -> None:
        axes = _over_steps(figure)
        _course(axes, curve, COLOR["qat"], "training batches")
        _level(axes, results.bf16.cross_entropy, INK, "teacher, held out")
        _held_out(axes, [(row.step, row.cross_entropy) for row in curve.validation], COLOR["qat"])
        _level(axes, qat.cross_entropy, COLOR["qat"], "QAT, held out")
        figure.legend(loc="outside lower center", ncols=2)

    caption = "The same start, steps and data, with the loss on the text instead of the teacher."
    return picture("training_qat", "QAT: cross entropy while training", draw, caption)


def _optimizer(results: RunResults) -> Picture:
    curves = {"qad": results.qad_curve} | ({"qat": results.qat_curve} if results.qat is not None else {})

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for name, curve in curves.items():
            steps = [row.step for row in curve.steps]
            style = {"color": COLOR[name], "label": LABEL[name]}
            top.plot(steps, [row.grad_norm for row in curve.steps], linewidth=0.9, alpha=0.8, **style)
            bottom.plot(steps, [row.lr for row in curve.steps], linewidth=1.4, color=COLOR[name])
        top.set(yscale="log", ylabel="gradient norm")
        top.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        top.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        top.yaxis.set_minor_formatter(NullFormatter())
        bottom.set(ylabel="learning rate", xlabel="step")
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        bottom.xaxis.set_major_locator(_step_ticks())
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        figure.align_ylabels()

    return picture("optimizer", "Gradient norm and learning rate", draw, "Gradient norms are measured before clipping.")


def _step_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True)


def _over_steps(figure: Figure) -> Axes:
    axes = figure.add_subplot(xlabel="step")
    axes.xaxis.set_major_locator(_step_ticks())
    return axes


def _course(axes: Axes, curve: Curve, color: str, label: str) -> None:
    """Every finite step thin, their centred running mean thick."""
    finite = [(row.step, row.loss) for row in curve.steps if np.isfinite(row.loss)]
    steps, losses = (np.array(values) for values in zip(*finite, strict=True)) if finite else (np.empty(0), np.empty(0))
    axes.plot(steps, losses, color=color, linewidth=0.6, alpha=0.45)
    window = max(1, len(losses) // 20)
    if window > 1:
        mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window // 2 :][: len(mean)], mean, color=color, linewidth=1.8, label=label)
    else:
        axes.lines[-1].set(linewidth=1.6, alpha=1.0, label=label)


def _held_out(axes: Axes, points: Sequence[tuple[int, float]], color: str) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            "o",
            color=PAPER,
            markeredgecolor=color,
            markeredgewidth=1.4,
            markersize=5,
            label="held out, on the way",
        )


def _level(axes: Axes, value: float, color: str, label: str) -> None:
    axes.axhline(value, color=color, linewidth=1.1, linestyle=(0, (5, 3)), label=label)


def _layers(grid: LayerGrid) -> Picture:
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
    power = math.floor(math.log10(worst.kl_to_teacher)) if worst.kl_to_teacher > 0 else 0
    head = "".join(f" {group.group}: {nats(group.kl_to_teacher)}." for group in groups if "." not in group.group)
    caption = (
        "Attention or MLP of one layer quantized, all else BF16; stronger colour is more. "
        f"Most: {worst.group}, {nats(worst.kl_to_teacher)}.{head}"
    )
    title = f"KL to the teacher of each part alone, in {10.0**power:g} nats per token"
    return _heat("layer_sensitivity", title, grid, lambda kl: f"{kl / 10.0**power:.1f}", caption)


def _heat(name: str, title: str, grid: LayerGrid, label: Callable[[float], str], caption: str) -> Picture:
    """One row per kind of part, one column per layer."""
    rows, columns = grid.errors.shape
    wide = columns > 12
    low, high = float(np.nanmin(grid.errors)), float(np.nanmax(grid.errors))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="layer")
        for (row, column), value in np.ndenumerate(grid.errors):
            if np.isnan(value):
                continue
            strength = (value - low) / (high - low) if high > low else 0.5
            axes.barh(row, 0.94, 0.9, left=column - 0.47, color=COLOR["qad"], alpha=0.10 + 0.5 * strength, linewidth=0)
            if columns <= 16:
                axes.text(column, row, label(value), ha="center", va="center", fontsize=8.5)
        axes.set_yticks(range(rows), grid.kinds)
        axes.tick_params(axis="y", labelcolor=INK)
        every = max(1, columns // 16)
        axes.set_xticks(range(0, columns, every), [str(layer) for layer in grid.layers[::every]])
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)

    size = (2 * WIDTH if wide else WIDTH, 0.9 + 0.34 * rows)
    return picture(name, title, draw, caption, width=size[0], height=size[1], wide=wide)
