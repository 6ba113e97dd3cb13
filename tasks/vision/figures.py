"""The contact sheet of an evaluation: images with what the model says of them, the wrong ones marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambaverse.engine.task import SampleSet
from mambaverse.tasks.vision.images import to_pil

COLUMNS = 10
SAMPLED, MISTAKEN = 40, 20  # images in the two parts of the sheet
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
        panel.suptitle(title, fontsize=9, x=0.01, ha="left")
        cells = panel.subplots(num_rows, COLUMNS, squeeze=False).flat
        panel.subplots_adjust(
            left=0.01, right=0.99, bottom=0.35 / (1.35 * num_rows + 0.6), top=1 - 0.4 / (1.35 * num_rows + 0.6),
            hspace=0.4, wspace=0.08,
        )  # fmt: skip
        for cell in cells:
            cell.axis("off")
        for cell, index in zip(panel.axes, chosen, strict=False):
            image = samples.sample(index, None)["image"]
            cell.imshow(to_pil(image), cmap="gray", vmin=0, vmax=255)
            said, true = (_short(classes[int(label[index])]) for label in (predicted, targets))
            text = f"{said}\n({true})" if wrong[index] else said
            cell.text(
                0.5, -0.04, text, transform=cell.transAxes, ha="center", va="top", fontsize=6.5, linespacing=0.95,
                color=WRONG if wrong[index] else "black",
            )  # fmt: skip
            if wrong[index]:
                height, width = image.shape[-2:]
                cell.plot(
                    [-0.5, width - 0.5, width - 0.5, -0.5, -0.5], [-0.5, -0.5, height - 0.5, height - 0.5, -0.5],
                    color=WRONG, linewidth=2.5, clip_on=False,
                )  # fmt: skip
    figure.savefig(path, dpi=120)
    return path


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
