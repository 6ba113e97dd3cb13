"""The picture of a benchmark: milliseconds on a logarithmic axis, forward left, forward and backward right.

Bars by case and backend, or lines over the length. Made without pyplot, so no display is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mambaverse.bench.report import Report, Row
from mambaverse.errors import UserError

SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = (
    "#4477aa",
    "#cc6633",
    "#228833",
    "#aa3377",
    "#66ccee",
    "#999933",
    "#777777",
    "#332288",
    "#ddaa33",
    "#882255",
)  # the colour-blind too
BAR_IN = 0.2  # inches of a bar


def draw(report: Report, path: Path) -> None:
    """Draw a report's times: those of CUDA graphs where there are any.

    Raises:
        UserError: if the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.6 if report.lines else _height(report.rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    graphs = any(row.forward.graph_ms > 0 for row in report.rows)
    for axes, title, values in (
        (panels[0], "forward", [row.forward.ms for row in report.rows]),
        (panels[1], "forward + backward", [row.step.ms for row in report.rows]),
    ):
        (_lines if report.lines else _bars)(axes, report.rows, values)
        axes.set_title(f"{title}, ms" + (", of CUDA graphs where taken" if graphs else ""), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(report.title, x=0.01, ha="left", fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}") from None


def _lines(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    for name, colour in _colours(rows).items():
        points = [(row.x, value) for row, value in zip(rows, values, strict=True) if row.name == name]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name)
    lengths = sorted({row.x for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{x / 1024:g}k" if x >= 1024 else f"{x:g}" for x in lengths])
    axes.set_xlabel("length")
    if any(value > 0 for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_tick_params(labelleft=True)
    axes.grid(alpha=0.25)


def _bars(axes: Axes, rows: Sequence[Row], values: Sequence[float]) -> None:
    places, ticks = _places(rows)
    for name, colour in _colours(rows).items():
        mine = [i for i, row in enumerate(rows) if row.name == name and values[i] > 0]
        bars = axes.barh([places[i] for i in mine], [values[i] for i in mine], height=0.85, color=colour, label=name)
        axes.bar_label(bars, [_written(values[i]) for i in mine], padding=3, fontsize=8)
    drawn = [value for value in values if value > 0]
    if drawn:
        axes.set_xscale("log")
        low, high = min(drawn), max(drawn)
        axes.set_xlim(low / 3, high * (high / low * 3) ** 0.15)  # room for the numbers, whatever the range
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=9)
    axes.tick_params(axis="y", length=0)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)


def _places(rows: Sequence[Row]) -> tuple[list[float], dict[str, float]]:
    """Return where each row's bar is, with a gap between cases, and the middle of each case."""
    places: list[float] = []
    for i, row in enumerate(rows):
        gap = 0.0 if i == 0 else 1.0 if rows[i - 1].case == row.case else 1.8
        places.append((places[-1] if places else 0.0) + gap)
    middles = {}
    for case in dict.fromkeys(row.case for row in rows):
        middles[case] = float(np.mean([place for place, row in zip(places, rows, strict=True) if row.case == case]))
    return places, middles


def _written(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _height(rows: Sequence[Row]) -> float:
    return 1.7 + BAR_IN * (_places(rows)[0][-1] + 1)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = dict.fromkeys(row.name for row in rows)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
