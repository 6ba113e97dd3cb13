"""The pictures of a run: curves.png (loss, metric, learning rate) and confusion.png.

Figures are made without pyplot, so they need no display and leave no global state behind. matplotlib is imported where
something is drawn: what draws nothing need not wait for it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mambaverse.engine.files import write_atomic
from mambaverse.engine.logs import Row
from mambaverse.errors import as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, EVAL, RATE = "#4477aa", "#cc6633", "#228833"  # told apart by the colour-blind too
LOG_RANGE = 50.0  # a loss that spans more than this is drawn on a logarithmic axis
MAX_WRITTEN = 20  # classes up to which every cell of a confusion matrix shows its number
MAX_CLASSES = 200  # beyond it a confusion matrix cannot be read


def draw_curves(path: Path, rows: Sequence[Row], metric: str, *, more_is_better: bool) -> None:
    """Draw loss, metric and learning rate over the epochs.

    Args:
        path: The PNG to write.
        rows: Those of metrics.jsonl.
        metric: The monitored metric, whose best value is marked.
        more_is_better: Whether that is the largest.
    """
    from matplotlib.figure import Figure

    steps = [row for row in rows if row["kind"] == "train"]
    epochs = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_loss(left, steps, epochs)
    _draw_metric(middle, epochs, metric, more_is_better)
    if steps:
        right.plot(*_series(steps, "lr"), color=RATE, marker=_marker(steps))
    else:
        words = "no step logged: fewer were\ntaken than trainer.log_every"
        right.text(0.5, 0.5, words, transform=right.transAxes, ha="center", va="center", color="grey")
    right.set_title("learning rate")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path, dpi=130)


def count_confusion(outputs: Tensor, targets: Tensor, num_classes: int) -> Tensor | None:
    """Return the counts (true class, predicted class) of a classifier's outputs (B, classes); None for another task."""
    classifier = outputs.ndim == 2 and outputs.shape[1] == num_classes and targets.ndim == 1
    if not classifier or targets.is_floating_point() or not 2 <= num_classes <= MAX_CLASSES:
        return None
    pairs = targets.long() * num_classes + outputs.argmax(dim=1)
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def draw_confusion(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """Draw a confusion matrix: a row for each true class, coloured by its share of that row.

    Args:
        path: The PNG to write.
        counts: (true class, predicted class), integers.
        classes: Their names.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    table = counts.numpy()
    size = len(classes)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    written = size <= MAX_WRITTEN
    inches = float(np.clip(2.2 + 0.42 * size, 4.2, 10.5) if written else np.clip(0.17 * size, 10.5, 24))
    font = 9.0 if written else float(np.clip(inches * 72 / size * 0.62, 4.5, 9.0))
    figure = Figure(figsize=(inches + 1.2, inches), layout="constrained")
    axes = figure.subplots()
    # Without numbers in the cells the colours must show a few per cent too: they grow with the root of the share.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(1.0 if written else 0.5, 0, 1), interpolation="nearest")
    names = [as_text(name) if len(name) <= 22 else as_text(name[:21]) + "…" for name in classes]
    fits = max(map(len, names)) * 0.7 * font < 0.75 * 72 * inches / size
    axes.set_xticks(range(size), names, rotation=0 if fits else 90, fontsize=font, parse_math=False)
    axes.set_yticks(range(size), names, fontsize=font, parse_math=False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5 if written else 0.2)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    right = int(np.trace(table))
    axes.set_title(f"{right:,} of {table.sum():,} right ({right / max(table.sum(), 1):.1%})", loc="left")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if written:
        cell = font if table.max() < 1000 else font * 0.75
        for row, column in zip(*np.nonzero(table), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{table[row, column]}", ha="center", va="center", color=colour, fontsize=cell)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    write_figure(figure, path, dpi=130 if written else 110)


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure in the format that the suffix of `path` says, whole or not at all."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(as_text(text.get_text()))
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a script that the font has not is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(
            buffer, format=path.suffix.removeprefix(".").lower(), dpi=dpi, bbox_inches="tight", pad_inches=0.15
        )
    write_atomic(path, buffer.getvalue())


def _draw_loss(axes: Axes, steps: Sequence[Row], epochs: Sequence[Row]) -> None:
    axes.set_title("loss")
    if steps:
        axes.plot(*_series(steps, "loss"), color=TRAIN, alpha=0.35, linewidth=1, label="training")
    axes.plot(*_series(epochs, "train_loss"), color=TRAIN, marker=_marker(epochs), label="training, mean")
    axes.plot(*_series(epochs, "loss"), color=EVAL, marker=_marker(epochs), label="evaluation")
    values = np.array([*_series(steps, "loss")[1], *_series(epochs, "train_loss")[1], *_series(epochs, "loss")[1]])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > LOG_RANGE:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)


def _draw_metric(axes: Axes, epochs: Sequence[Row], metric: str, more_is_better: bool) -> None:
    x, y = _series(epochs, metric)
    axes.set_title("evaluation loss" if metric == "loss" else metric.replace("_", " "))
    axes.plot(x, y, color=EVAL, marker=_marker(epochs))
    if not y or not np.isfinite(y).any():
        return
    best = int(np.nanargmax(y) if more_is_better else np.nanargmin(y))
    axes.plot([x[best]], [y[best]], "o", color=EVAL, markersize=8, markerfacecolor="white", markeredgewidth=2)
    label = f"best {y[best]:.4g}, epoch {x[best]:.0f}"
    axes.text(0.98, 0.04 if more_is_better else 0.94, label, transform=axes.transAxes, ha="right", color=EVAL)


def _series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Return (epochs, values) of the rows that have `key`; null becomes a gap."""
    found = [row for row in rows if key in row]
    return [row["epoch"] for row in found], [np.nan if row[key] is None else row[key] for row in found]


def _marker(rows: Sequence[Row]) -> str:
    return "." if len(rows) <= 30 else ""
