"""The sheet of an evaluation: spectrograms with what the model says of them, the wrong ones marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambaverse.engine.plots import write_figure
from mambaverse.engine.task import SampleSet
from mambaverse.tasks.audio.frontend import FrontEnd

COLUMNS = 6
SAMPLED, MISTAKEN = 18, 12  # clips in the two parts of the sheet
SHOWN_SECONDS = 10.0  # of a clip
RANGE = 9.2  # of the colours, below a clip's loudest point, in ln of energy: 40 dB
WRONG = "#c62828"
CELL_INCHES, ROW_INCHES, HEAD_INCHES = 1.75, 1.55, 0.5
LABEL_CHARACTERS = 18


def spectrogram_sheet(
    path: Path, samples: SampleSet, front: FrontEnd, outputs: Tensor, targets: Tensor, classes: Sequence[str]
) -> Path:
    """Draw evenly spaced clips of an evaluation, and below them its most confident mistakes.

    Args:
        path: The .png to write.
        samples: The evaluated clips, whose samples hold "waveform" (L,).
        front: Makes their log-mel spectrograms.
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
    share = 1 - wrong.double().mean().item()
    num = len(targets)
    title = (
        f"{len(spread)} of {num:,} evaluated clips, mel bands over time; {share:.2%} of all are right; red: said (is)"
    )
    parts = [(title, spread)]
    if mistakes:
        parts.append((f"the {len(mistakes)} most confident of {int(wrong.sum()):,} mistakes", mistakes))
    heights = [math.ceil(len(chosen) / COLUMNS) * ROW_INCHES + HEAD_INCHES for _, chosen in parts]
    figure = Figure(figsize=(COLUMNS * CELL_INCHES, sum(heights)))
    panels = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (title, chosen), height in zip(panels, parts, heights, strict=True):
        panel.suptitle(title, fontsize=9, x=0.01, ha="left", y=1 - 0.12 / height, va="top")
        cells = panel.subplots(math.ceil(len(chosen) / COLUMNS), COLUMNS, squeeze=False).flat
        panel.subplots_adjust(
            left=0.03, right=0.99, bottom=0.28 / height, top=1 - 0.62 / height, hspace=0.4, wspace=0.12
        )
        for cell in cells:
            cell.axis("off")
        for cell, index in zip(panel.axes, chosen, strict=False):
            waveform = samples.sample(index, None)["waveform"][: int(SHOWN_SECONDS * front.rate)]
            image = front.spectrogram(waveform[None])[0].T  # (F, T)
            top = float(image.max())
            seconds = len(waveform) / front.rate
            cell.axis("on")
            cell.imshow(
                image.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=top - RANGE, vmax=top,
                extent=(0, seconds, 0, len(image)),
            )  # fmt: skip
            cell.set_xticks([])
            cell.set_yticks([])
            cell.text(1, -0.03, f"{seconds:.2f} s", transform=cell.transAxes, ha="right", va="top", fontsize=6)
            said, true = (_short(classes[int(label[index])]) for label in (predicted, targets))
            colour = WRONG if wrong[index] else "black"
            text = f"{said} ({true})" if wrong[index] else said
            cell.set_title(f"{text}  {probability[index]:.0%}", fontsize=7, color=colour, pad=3, parse_math=False)
            for side in cell.spines.values():
                side.set_color(colour)
                side.set_linewidth(2.5 if wrong[index] else 0.5)
    write_figure(figure, path, dpi=120)
    return path


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"
