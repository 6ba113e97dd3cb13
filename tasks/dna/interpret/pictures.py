"""The picture of a mutagenesis: a logo of what each base is worth, and below it what each substitution changes.

height of a letter    minus the mean change by the three substitutions of that base
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mambaverse.engine.plots import write_figure
from mambaverse.tasks.dna.encoders import one_hot
from mambaverse.tasks.dna.logo import LETTERS, draw_logo

LINE_BASES, LINES = 80, 6  # of a long region the part that says most is drawn in letters
COLOURS = "RdBu_r"  # red: likelier, or for the class


def worth(changes: np.ndarray) -> np.ndarray:
    """Return minus the mean change by the three substitutions at each place, (n,); NaN where there is no base."""
    return -changes.sum(1) / 3


def draw_mutagenesis(path: Path, ids: np.ndarray, changes: np.ndarray, first: int, title: str, unit: str) -> Path:
    """Draw the changes by all substitutions of a region.

    Args:
        path: The picture to write.
        ids: The region's bases (n,).
        changes: By A, C, G and T, (n, 4).
        first: Number of its first base.
        title: What it is.
        unit: What the numbers are.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    values = worth(changes)
    shown = min(len(ids), LINE_BASES * LINES)
    width = min(max(shown, LINE_BASES // 2), LINE_BASES)  # few bases do not fill the line: letters keep their shape
    start = int(np.convolve(np.nan_to_num(np.abs(values)), np.ones(shown), "valid").argmax())
    starts = range(start, start + shown, LINE_BASES)
    known = np.abs(changes[~np.isnan(changes)])
    limit = float(np.percentile(known, 99)) if known.any() else 1.0
    overview = len(ids) > shown
    ratios = [0.55] * overview + [1.0, 0.62] * len(starts)
    figure = Figure(figsize=(12, 1.5 + 1.05 * sum(ratios)), layout="constrained")
    axes = list(figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
    if overview:
        image = _heat(axes[0], changes, first, limit)
        axes[0].axvspan(first + start - 0.5, first + start + shown - 0.5, fill=False, linewidth=1.2)
        axes[0].set_title(f"all {len(ids):,} bases; framed: the part below", fontsize=8, loc="left")
        axes = axes[1:]
    top, bottom = (float(np.nanmax(sign * values[start : start + shown], initial=0)) for sign in (1, -1))
    for above, below, line in zip(axes[::2], axes[1::2], starts, strict=True):
        part = slice(line, min(line + LINE_BASES, start + shown))
        draw_logo(above, one_hot(ids[part]) * np.nan_to_num(values[part, None]), start=first + line)
        above.set_ylim(-1.05 * bottom - 0.02 * limit, 1.05 * top + 0.02 * limit)
        above.set_xticks([])
        above.tick_params(labelsize=6)
        above.spines[["top", "right", "bottom"]].set_visible(False)
        image = _heat(below, changes[part], first + line, limit, ids[part])
        for one in (above, below):
            one.set_xlim(first + line - 0.6, first + line + width - 0.4)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=40, pad=0.01, extend="both")
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10, parse_math=False)
    write_figure(figure, path, dpi=130)
    return path


def _heat(axes: Any, changes: np.ndarray, first: int, limit: float, ids: np.ndarray | None = None) -> Any:
    """Draw changes (n, 4) as colours, with a dot on each base that is there; returns the image."""
    from matplotlib import colormaps

    extent = (first - 0.5, first + len(changes) - 0.5, 3.5, -0.5)
    how = {
        "cmap": colormaps[COLOURS].with_extremes(bad="0.85"),
        "vmin": -limit,
        "vmax": limit,
        "interpolation": "nearest",
    }
    image = axes.imshow(changes.T, aspect="auto", extent=extent, **how)
    if ids is not None:
        place, base = one_hot(ids).nonzero()
        axes.plot(first + place, base, ".", color="0.35", markersize=2.5)
        axes.set_xticks([x for x in range(first, first + len(changes)) if x % 10 == 0])
        axes.spines[:].set_visible(False)
    axes.set_yticks(range(4), labels=list(LETTERS), fontsize=6, family="monospace")
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return image
