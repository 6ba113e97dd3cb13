"""Contact sheets: images with what the model says of them; of an evaluation, with the wrong ones marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaverse.engine.plots import write_figure
from mambaverse.engine.task import SampleSet
from mambaverse.tasks.vision.images import to_pil

COLUMNS = 10
SAMPLED, MISTAKEN = 40, 20  # images in the two parts of the sheet
SHEET_SIZE = 100  # images in the sheet of `predict`
WRONG = "#c62828"
CELL_INCHES = 0.95
LABEL_CHARACTERS = 12  # of a class name, under a cell


def contact_sheet(path: Path, samples: SampleSet, outputs: Tensor, targets: Tensor, classes: Sequence[str]) -> Path:
    """Draw evenly spaced images of an evaluation, and below them its most confident mistakes.

    Args:
        path: The .png to write.
        samples: The evaluated images, whose samples hold uint8 "image" (C, H, W).
        outputs: Logits of all of them, (N, classes).
        targets: Their classes, (N,).
        classes: Names.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    probability, predicted = outputs.float().softmax(-1).max(-1)
    wrong = predicted != targets
    spread = torch.linspace(0, len(targets) - 1, min(SAMPLED, len(targets))).round().long().tolist()
    surest_first = probability.argsort(descending=True, stable=True)
    mistakes = surest_first[wrong[surest_first]][:MISTAKEN].tolist()
    num_wrong, share = int(wrong.sum()), 1 - wrong.double().mean().item()
    title = f"{len(spread)} of {len(targets):,} evaluation images; {share:.2%} of all are right; red: said (is)"
    parts = [(title, spread)]
    if mistakes:
        parts.append((f"the {len(mistakes)} most confident of {num_wrong:,} mistakes", mistakes))
    rows = [math.ceil(len(chosen) / COLUMNS) for _, chosen in parts]
    figure = Figure(figsize=(COLUMNS * CELL_INCHES, (sum(rows) * 1.35 + 0.6 * len(rows)) * CELL_INCHES))
    panels = figure.subfigures(len(parts), 1, height_ratios=[1.35 * n + 0.6 for n in rows], squeeze=False)[:, 0]
    for panel, (title, chosen), num_rows in zip(panels, parts, rows, strict=True):
        images = [samples.sample(index, None)["image"] for index in chosen]
        said, true = ([_short(classes[int(label[i])]) for i in chosen] for label in (predicted, targets))
        bad = [bool(wrong[index]) for index in chosen]
        texts = [f"{s}\n({t})" if w else s for s, t, w in zip(said, true, bad, strict=True)]
        _draw_cells(panel, title, num_rows, images, texts, bad)
    write_figure(figure, path, dpi=120)
    return path


def label_sheet(
    path: Path, images: Sequence[Tensor], labels: Sequence[str], probabilities: Sequence[float], total: int
) -> Path:
    """Draw images with the label and the confidence of each.

    Args:
        path: The file to write; its suffix says the format.
        images: uint8 (C, H, W) each, at most `SHEET_SIZE`.
        labels: What is said of each,
        probabilities: and how surely.
        total: How many images were labelled, of which these are the first.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(images) / COLUMNS)
    figure = Figure(figsize=(COLUMNS * CELL_INCHES, (1.35 * rows + 0.6) * CELL_INCHES))
    shown = f"{total:,} image{'s' * (total != 1)}"
    shown = shown if len(images) == total else f"the first {len(images)} of {shown}"
    texts = [f"{_short(label)}\n{share:.0%}" for label, share in zip(labels, probabilities, strict=True)]
    _draw_cells(figure, f"{shown}, with label and confidence", rows, images, texts, [False] * len(images))
    write_figure(figure, path, dpi=120)
    return path


def _draw_cells(
    panel: Any, title: str, rows: int, images: Sequence[Tensor], texts: Sequence[str], wrong: Sequence[bool]
) -> None:
    """Draw `rows` of images with a text below each, the wrong ones framed, into a figure or subfigure."""
    panel.suptitle(title, fontsize=9, x=0.01, ha="left")
    cells = panel.subplots(rows, COLUMNS, squeeze=False).flat
    height = 1.35 * rows + 0.6
    panel.subplots_adjust(left=0.01, right=0.99, bottom=0.35 / height, top=1 - 0.4 / height, hspace=0.4, wspace=0.08)
    for cell in cells:
        cell.axis("off")
    for cell, image, text, bad in zip(panel.axes, images, texts, wrong, strict=False):
        cell.imshow(to_pil(image), cmap="gray", vmin=0, vmax=255)
        colour = WRONG if bad else "black"
        cell.text(
            0.5, -0.04, text, transform=cell.transAxes, ha="center", va="top", fontsize=6.5, linespacing=0.95,
            color=colour, parse_math=False,
        )  # fmt: skip
        if bad:
            height, width = image.shape[-2:]
            cell.plot(
                [-0.5, width - 0.5, width - 0.5, -0.5, -0.5], [-0.5, -0.5, height - 0.5, height - 0.5, -0.5],
                color=WRONG, linewidth=2.5, clip_on=False,
            )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
