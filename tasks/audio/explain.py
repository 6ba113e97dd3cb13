"""What an audio model looks at in a clip: integrated gradients over its spectrogram, or over its waveform.

Source: see mambaverse/attribution.py. The baseline is the data's mean input, which is 0 behind the normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambaverse.attribution import integrated_gradients
from mambaverse.engine.plots import write_figure

COLUMNS = 200  # of the strip that sums up what a moment says
FOR, AGAINST = "#b2182b", "#2166ac"


def piece_shares(score: Callable[[Tensor, Tensor], Tensor], x: Tensor, length: Tensor, label: int) -> Tensor:
    """Return what each number of one input adds to the score of class `label`, in its shape.

    Args:
        score: Takes inputs (B, L) or (B, T, F) and lengths (B,), and returns logits (B, classes).
        x: One input, (L,) or (T, F).
        length: Its length, a scalar.
        label: The class.
    """
    return integrated_gradients(lambda xs: score(xs, length.expand(len(xs)))[:, label], x, torch.zeros_like(x))


def draw_clip(path: Path, title: str, said: str, seconds: float, x: Tensor, shares: Tensor) -> None:
    """Draw an input (L,) or (T, F) of `seconds`, what its parts say for and against the class `said`, and its moments.

    Args:
        path: The .png to write.
        title: Of the picture.
        said: The class.
        seconds: How long the input is.
        x: The input, as the model gets it.
        shares: Likewise.
    """
    from matplotlib.figure import Figure

    spectrogram = x.ndim == 2
    figure = Figure(figsize=(11, 6.2 if spectrogram else 3.8), layout="constrained")
    rows = figure.subplots(3 if spectrogram else 2, 1, sharex=True, height_ratios=[2, 2, 1] if spectrogram else [2, 1])
    if spectrogram:
        extent = (0, seconds, 0, x.shape[1])
        limit = float(np.quantile(shares.abs().numpy(), 0.995)) or 1.0
        how: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent}
        rows[0].imshow(x.T.numpy(), cmap="magma", **how)
        rows[1].imshow(shares.T.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, **how)
        rows[0].set_title("the input: bands over time", fontsize=9, loc="left")
        rows[1].set_title("what speaks for it (red) and against it (blue)", fontsize=9, loc="left")
    else:
        rows[0].plot(torch.linspace(0, seconds, len(x)).numpy(), x.numpy(), color="#666666", linewidth=0.4)
        rows[0].set_title("the input: a waveform", fontsize=9, loc="left")
    moments = [part.sum().item() for part in shares.tensor_split(min(COLUMNS, len(shares)))]
    width = seconds / len(moments)
    colours = [FOR if value > 0 else AGAINST for value in moments]
    rows[-1].bar([(i + 0.5) * width for i in range(len(moments))], moments, width=width, color=colours)
    rows[-1].axhline(0, color="black", linewidth=0.5)
    rows[-1].set_title("summed up by moments (integrated gradients from the mean input)", fontsize=9, loc="left")
    rows[-1].set_xlabel("seconds", fontsize=9)
    rows[-1].set_xlim(0, seconds)
    for axes in rows:
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {said}", fontsize=10, parse_math=False)
    write_figure(figure, path, dpi=120)
