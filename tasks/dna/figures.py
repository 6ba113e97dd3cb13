"""Pictures of an evaluation: sequences with what the model says of them, and the bases that it says so for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mambaverse.engine.data import to_device
from mambaverse.engine.plots import write_figure
from mambaverse.engine.task import Sample
from mambaverse.tasks.dna.encoders import one_hot
from mambaverse.tasks.dna.logo import COLOURS, draw_logo
from mambaverse.tasks.dna.saliency import saliency
from mambaverse.tasks.dna.sequences import DnaSamples
from mambaverse.tasks.dna.tokens import A, N, decode

if TYPE_CHECKING:
    from mambaverse.tasks.dna.task import DnaTask

SAMPLED, MISTAKEN = 16, 8  # sequences in the two parts of the sheet
LETTERED = 100  # bases, up to which the sheet shows letters
EXPLAINED_LINES = 6  # of one record
LOGOS, LOGO_BASES = 6, 80  # sequences of the saliency sheet, and the bases of each that are drawn
WRONG = "#c62828"


def read_sheet(path: Path, samples: DnaSamples, outputs: Tensor, targets: Tensor, classes: Sequence[str]) -> Path:
    """Draw evenly spaced sequences of an evaluation, and below them its most confident mistakes.

    Args:
        path: The .png to write.
        samples: The evaluated sequences.
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
    surest = probability.argsort(descending=True, stable=True)
    mistakes = surest[wrong[surest]][:MISTAKEN].tolist()
    share = 1 - wrong.double().mean().item()
    parts = [(f"{len(spread)} of {len(targets):,} sequences; {share:.2%} of all are right; red: said (is)", spread)]
    if mistakes:
        parts.append((f"the {len(mistakes)} most confident of {int(wrong.sum()):,} mistakes", mistakes))
    heights = [len(chosen) for _, chosen in parts]
    figure = Figure(figsize=(11, 0.24 * sum(heights) + 0.6 * len(parts)), layout="constrained")
    rows = figure.subplots(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (title, chosen) in zip(rows, parts, strict=True):
        _strips(axes, [samples.sample(i, None)["ids"] for i in chosen])
        axes.set_title(title, fontsize=9, loc="left")
        for row, index in enumerate(chosen):
            said, true = (classes[int(label[index])] for label in (predicted, targets))
            text = f" {said} {probability[index]:.2f}" + (f" ({true})" if wrong[index] else "")
            colour = WRONG if wrong[index] else "black"
            axes.text(
                1.0, row, text, transform=axes.get_yaxis_transform(), fontsize=7, va="center", color=colour,
                parse_math=False,
            )  # fmt: skip
    write_figure(figure, path, dpi=130)
    return path


def saliency_sheet(
    path: Path, task: DnaTask, model: nn.Module, samples: DnaSamples, outputs: Tensor, targets: Tensor
) -> Path:
    """Draw, for the surest right sequence of each class (six at most), the bases that speak for the class as a logo.

    Of a longer sequence the part that says most is drawn. Returns `path`.
    """
    from matplotlib.figure import Figure

    probability, predicted = outputs.float().softmax(-1).max(-1)
    chosen: list[int] = []
    for label in range(len(task.classes)):
        rows = ((targets == label) & (predicted == label)).nonzero().flatten()
        if len(rows):
            chosen.append(int(rows[probability[rows].argmax()]))
    chosen = (chosen or [int(probability.argmax())])[:LOGOS]
    batch = task.collate([samples.sample(i, None) for i in chosen], None)
    device = next(model.parameters()).device
    lengths = batch.get("lengths")
    shares = saliency(model, batch["ids"].to(device), None if lengths is None else lengths.to(device)).cpu().numpy()
    figure = Figure(figsize=(11, 1.35 * len(chosen) + 0.5), layout="constrained")
    for axes, index, ids, values in zip(
        figure.subplots(len(chosen), 1, squeeze=False)[:, 0], chosen, batch["ids"].numpy(), shares, strict=True
    ):
        start = _loudest(np.abs(values), min(LOGO_BASES, len(values)))
        part = slice(start, start + LOGO_BASES)
        draw_logo(axes, one_hot(ids[part]) * values[part, None], start=start + 1)
        true = task.classes[int(targets[index])]
        title = (
            f"{samples.sequences.names[index]}: {task.classes[int(predicted[index])]} {probability[index]:.2f} ({true})"
        )
        axes.set_title(title, fontsize=8, loc="left", parse_math=False)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_yticks([])
    figure.suptitle(
        "what each base adds to the class's score (gradient x input); below the line: against it", fontsize=9
    )
    figure.supxlabel("base", fontsize=8)
    write_figure(figure, path, dpi=130)
    return path


def explained_record(path: Path, task: DnaTask, model: nn.Module, name: str, sample: Sample) -> None:
    """Draw the bases of one record that speak for the class that is said of it as a logo, several lines of them.

    Of a record of several windows that one is drawn which says most for the class, and of a longer window than fits the
    part that does.
    """
    from matplotlib.figure import Figure

    device = next(model.parameters()).device
    batch = to_device(task.collate([sample], None), device)
    lengths = batch.get("lengths")
    with torch.no_grad():
        chances = task.probabilities(task.forward(model, batch))[0]
        label = int(chances.argmax())
        window = int(task.probabilities(model(batch["ids"], lengths=lengths))[:, label].argmax())
    size = batch["ids"].shape[1] if lengths is None else int(lengths[window])
    ids = batch["ids"][window : window + 1, :size]
    values = saliency(model, ids, target=torch.tensor([label], device=device))[0].cpu().numpy()
    start = _loudest(np.abs(values), min(EXPLAINED_LINES * LOGO_BASES, size))
    starts = range(start, min(start + EXPLAINED_LINES * LOGO_BASES, size), LOGO_BASES)
    figure = Figure(figsize=(11, 1.35 * len(starts) + 0.5), layout="constrained")
    largest = float(np.abs(values).max()) or 1.0
    for axes, first in zip(figure.subplots(len(starts), 1, squeeze=False)[:, 0], starts, strict=True):
        part = slice(first, first + LOGO_BASES)
        draw_logo(axes, one_hot(ids[0].cpu().numpy()[part]) * values[part, None], start=first + 1)
        axes.set_xlim(first + 0.4, first + LOGO_BASES + 0.6)
        axes.set_ylim(-largest, largest)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_yticks([])
    windows = "" if len(batch["ids"]) == 1 else f", window {window + 1} of {len(batch['ids'])}"
    said = f"{name}{windows}: {task.classes[label]} {chances[label]:.2f}"
    text = f"{said}; what each base adds to its score (gradient x input), below the line: against"
    figure.suptitle(text, fontsize=9, parse_math=False)
    figure.supxlabel("base", fontsize=8)
    write_figure(figure, path, dpi=130)


def _strips(axes: Any, sequences: Sequence[np.ndarray]) -> None:
    """Draw one strip of coloured bases a row, numbered from 1, with letters if they are short."""
    from matplotlib.colors import ListedColormap

    count, longest = len(sequences), max(map(len, sequences))
    picture = np.full((count, longest), np.nan)
    for row, ids in enumerate(sequences):
        picture[row, : len(ids)] = np.clip(ids, A, N) - A
    axes.imshow(
        picture, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=N - A, aspect="auto", alpha=0.75,
        extent=(0.5, longest + 0.5, count - 0.5, -0.5),
    )  # fmt: skip
    if longest <= LETTERED:
        for row, ids in enumerate(sequences):
            for place, letter in enumerate(decode(ids), 1):
                axes.text(place, row, letter, fontsize=5.5, ha="center", va="center", family="monospace")
    axes.set_yticks(np.arange(count - 1) + 0.5, labels=[])
    axes.grid(axis="y", color="white", linewidth=2)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _loudest(values: np.ndarray, width: int) -> int:
    """Return where the window of `width` values with the largest sum begins."""
    sums = np.convolve(values, np.ones(width), "valid")
    return int(sums.argmax())
