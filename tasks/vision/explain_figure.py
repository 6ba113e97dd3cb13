"""The picture of `mambaverse explain` for an image: scores, what speaks for the class, receptive field, Δ maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.engine.plots import write_figure
from mambaverse.tasks.vision.explain import COVERED, DeltaMap, Explanation
from mambaverse.tasks.vision.images import to_pil

SCORES = 5  # classes whose scores are shown
COLUMNS, LAYERS = 7, 12  # of the Δ maps: side by side, and at most; of more layers evenly spaced ones are shown
SMOOTH = 1 / 64  # σ by which shares are smoothed, in units of the image's side; pixel by pixel they are all noise
LEAST_SPREAD = 0.005  # ln of the largest multiple on the colour bar: where all tokens are alike, all stay pale
TOP_INCHES, HEADER_INCHES, PANEL_INCHES = 3.1, 0.5, 2.15
FONT = 8.0
CHOSEN, OTHER = "#4477aa", "#bbbbbb"


def explain_sheet(
    path: Path, name: str, image: Tensor, probabilities: Tensor, classes: Sequence[str], explanation: Explanation
) -> Path:
    """Draw one image's `Explanation`.

    Args:
        path: The .png to write.
        name: What the image is called.
        image: uint8 (C, H, W), as the model sees it.
        probabilities: Of the classes (classes,).
        classes: Their names.
        explanation: The numbers.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    panels = delta_panels(explanation.deltas)
    rows = math.ceil(len(panels) / COLUMNS)
    top, bottom = TOP_INCHES, HEADER_INCHES + PANEL_INCHES * rows
    figure = Figure(figsize=(12.5, top + bottom), layout="constrained")
    upper, lower = cast(Any, figure.subfigures(2, 1, height_ratios=[top, bottom]))
    picture, scores, shares, reach = upper.subplots(1, 4)
    grey = image.float().mean(0).numpy()
    picture.imshow(to_pil(image), cmap="gray", vmin=0, vmax=255)
    _bare(picture, _short(Path(name).name, 34))
    _draw_scores(scores, probabilities, classes)
    said = classes[int(probabilities.argmax())]
    _draw_shares(upper, shares, grey, explanation.shares, said)
    _draw_reach(reach, grey, explanation)
    if panels:
        _draw_deltas(lower, panels, rows, explanation.without)
    else:
        lower.text(0.01, 0.5, f"No Δ maps: {explanation.note}.", fontsize=FONT + 1, va="center", color="#555555")
    write_figure(figure, path, dpi=120)
    return path


def delta_panels(deltas: Sequence[DeltaMap]) -> list[tuple[str, np.ndarray]]:
    """Return (title, Δ as a multiple of the layer's mean (H, W)): each scan over all layers, then layer by layer.

    The mean over layers is one of these multiples, on the finest grid; a layer's panel is the mean of its scans.
    """
    if not deltas:
        return []
    scans = list(dict.fromkeys(scan for delta in deltas for scan in delta.maps))
    finest = max((next(iter(delta.maps.values())).shape for delta in deltas), key=math.prod)
    panels = []
    for scan in scans if len(scans) > 1 or len(deltas) > 1 else []:
        ratios = [_ratio(delta.maps[scan]) for delta in deltas if scan in delta.maps]
        same = [F.interpolate(r[None, None], tuple(finest), mode="nearest")[0, 0] for r in ratios]
        panels.append((f"{scan}, all layers", torch.stack(same).mean(0).numpy()))
    shown = torch.linspace(0, len(deltas) - 1, min(LAYERS, len(deltas))).round().long().tolist()
    for delta in (deltas[i] for i in shown):
        mean = torch.stack(list(delta.maps.values())).mean(0)
        cls = "" if delta.cls is None else f", cls {delta.cls:.1f}x"
        panels.append((f"{delta.layer}: Δ {mean.mean():.2g}{cls}", _ratio(mean).numpy()))
    return panels


def _draw_scores(axes: Any, probabilities: Tensor, classes: Sequence[str]) -> None:
    values, order = probabilities.sort(descending=True)
    values, order = values[:SCORES], order[:SCORES]
    places = range(len(values))
    axes.barh(places, values.numpy(), color=[CHOSEN] + [OTHER] * (len(values) - 1), height=0.55)
    for place, value, label in zip(places, values.tolist(), order.tolist(), strict=True):
        text = f"{_short(classes[label], 30)}  {value:.1%}"
        axes.text(0, place - 0.34, text, fontsize=FONT, va="bottom", parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(SCORES - 0.6, -0.75)
    axes.set_title("what the model says", fontsize=FONT + 1)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=FONT - 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_box_aspect(1)


def _draw_shares(figure: Any, axes: Any, grey: np.ndarray, shares: Tensor, said: str) -> None:
    """Red and blue over a pale image, as strong as the share is large."""
    smooth = _smoothed(shares).numpy()
    limit = float(np.quantile(np.abs(smooth), 0.995)) or 1.0
    strength = np.clip(np.abs(smooth) / limit, 0, 1) ** 0.7
    axes.imshow(grey, cmap="gray", vmin=-600, vmax=255)
    axes.imshow(smooth, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=strength)
    _bare(axes, f"for {_short(said, 20)} (red), against (blue)")
    axes.set_xlabel("integrated gradients from the mean colour", fontsize=FONT - 1)


def _draw_reach(axes: Any, grey: np.ndarray, explanation: Explanation) -> None:
    if explanation.reach is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no receptive field:\nthe model has no feature map", ha="center", va="center",
                  fontsize=FONT, color="#555555", transform=axes.transAxes)  # fmt: skip
        return
    reach = explanation.reach.numpy()
    axes.imshow((reach / max(float(reach.max()), 1e-30)) ** 0.5, cmap="magma", vmin=0, vmax=1)
    height, width = explanation.middle
    axes.plot(width, height, "+", color="white", markersize=9, markeredgewidth=1.5)
    _bare(axes, "effective receptive field of the middle")
    axes.set_xlabel(f"{COVERED:.0%} of it in {explanation.covered:.0%} of the image", fontsize=FONT - 1)


def _draw_deltas(figure: Any, panels: Sequence[tuple[str, np.ndarray]], rows: int, without: Sequence[str]) -> None:
    from matplotlib.colors import LogNorm

    values = np.concatenate([panel.ravel() for _, panel in panels])
    spread = max(float(np.quantile(np.abs(np.log(values.clip(1e-6))), 0.98)), LEAST_SPREAD)
    ticks = [math.exp(-spread), 1.0, math.exp(spread)]
    header, body = figure.subfigures(2, 1, height_ratios=[HEADER_INCHES, PANEL_INCHES * rows])
    cells = body.subplots(rows, max(COLUMNS - 1, math.ceil(len(panels) / max(rows, 1))), squeeze=False)
    for cell in cells.flat:
        cell.axis("off")
    for cell, (title, panel) in zip(cells.flat, panels, strict=False):
        cell.axis("on")
        drawn = cell.imshow(panel, cmap="PuOr_r", norm=LogNorm(ticks[0], ticks[-1]))
        _bare(cell, title, FONT - 0.5)
    left_out = f"; no Δ in {', '.join(without)}" if without else ""
    text = f"how strongly each token is written into the state: Δ, beside the mean over its layer's tokens{left_out}"
    header.text(0.01, 0.45, text, fontsize=FONT + 1, va="center")
    bar = figure.figure.colorbar(drawn, cax=header.add_axes([0.8, 0.5, 0.17, 0.2]), orientation="horizontal")
    bar.set_ticks(ticks, labels=[f"{tick:.4g}x" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=FONT - 1, length=2, pad=1)


def _smoothed(shares: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    sigma = SMOOTH * max(shares.shape)
    if sigma < 0.75:  # small images are looked at pixel by pixel
        return shares
    return gaussian_blur(shares[None], 2 * [2 * math.ceil(2 * sigma) + 1], 2 * [sigma])[0]


def _ratio(delta: Tensor) -> Tensor:
    return delta / delta.mean().clamp(min=1e-30)


def _bare(axes: Any, title: str, size: float = FONT + 1) -> None:
    axes.set_title(title, fontsize=size, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#999999")


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
