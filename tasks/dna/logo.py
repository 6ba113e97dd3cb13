"""Sequence logos: letters stacked by height, those below the line upside down.

Source: Schneider and Stephens 1990, "Sequence logos", Nucleic Acids Research 18(20); the colours are the field's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

COLOURS = {"A": "#109648", "C": "#255c99", "G": "#f7b32b", "T": "#d62839", "N": "#9e9e9e"}
LETTERS = "ACGT"


@lru_cache
def _outline(letter: str) -> Any:
    """Return the outline of a letter, scaled to the unit square."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), letter, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, 1 / box.height).transform_path(path)


def draw_logo(axes: Any, heights: np.ndarray, letters: str = LETTERS, start: int = 0) -> None:
    """Draw a logo into matplotlib axes.

    Args:
        axes: Where.
        heights: Of each letter at each place (L, len(letters)); positive ones are stacked upwards, negative downwards.
        letters: What the columns stand for.
        start: The number of the first place on the x axis.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import PathPatch
    from matplotlib.transforms import Affine2D

    patches, colours = [], []
    for place, row in enumerate(np.asarray(heights, float)):
        for sign in (1, -1):
            base = 0.0
            for column in np.argsort(sign * row):  # the tallest outermost
                height = sign * row[column]
                if height <= 0:
                    continue
                move = Affine2D().scale(0.92, sign * height).translate(start + place - 0.46, base)
                patches.append(PathPatch(move.transform_path(_outline(letters[column]))))
                colours.append(COLOURS.get(letters[column], "black"))
                base += sign * height
    axes.add_collection(PatchCollection(patches, facecolors=colours, linewidths=0))
    up, down = (np.clip(sign * heights, 0, None).sum(1).max(initial=0) for sign in (1, -1))
    margin = 0.05 * ((up + down) or 1.0)
    axes.set_xlim(start - 0.6, start + len(heights) - 0.4)
    axes.set_ylim(-down - margin, up + margin)
    axes.axhline(0, color="black", linewidth=0.6)
