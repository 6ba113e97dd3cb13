"""Weights of other code for Audio Mamba: those of its authors, and of Vision Mamba's, from which they began.

Audio Mamba     names as ours, perhaps behind "module."; `pos_embed.pos_embed` with the cls token's row first, as ours
Vision Mamba    `pos_embed` in the order of the sequence: the row of the cls token is the middle one and moves to the
                front; the filters of red, green and blue are averaged

Another number of frames stretches the position embedding; a head for other classes is left as it is initialised.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from mambaverse.engine.checkpoint import CheckpointError, load_state, read_weights
from mambaverse.errors import warn
from mambaverse.tasks.audio.aum import AuM, stretch


def load_aum(model: nn.Module, path: Path) -> None:
    """Load the weights file `path` into `model`; other models than AuM need their own names and shapes.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    weights = read_weights(path)
    if isinstance(model, AuM):
        weights = convert(weights, model, str(path))
    load_state(model, weights, str(path))


def convert(weights: dict[str, Tensor], model: AuM, source: str) -> dict[str, Tensor]:
    """Return weights of Audio Mamba or Vision Mamba under the names and in the shapes of `model`."""
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    rows, columns = model.pos_embed.grid
    prefix = model.pos_embed.prefix
    old_rows = rows
    if "pos_embed" in weights:
        table = weights.pop("pos_embed")
        if prefix:
            middle = (table.shape[1] - 1) // 2
            table = torch.cat([table[:, middle : middle + 1], table[:, :middle], table[:, middle + 1 :]], 1)
        weights["pos_embed.pos_embed"] = table
        old_rows = round((table.shape[1] - prefix) ** 0.5)  # images are square
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].mean(1, keepdim=True)
    name = "pos_embed.pos_embed"
    if name in weights and weights[name].shape != model.pos_embed.pos_embed.shape:
        weights[name] = _resize(weights[name], prefix, old_rows, (rows, columns), source)
    own = model.state_dict()
    if "head.weight" in own and "head.weight" in weights and weights["head.weight"].shape != own["head.weight"].shape:
        warn(
            f"{source}: its head knows {len(weights['head.weight'])} classes and is left out; "
            f"that for {len(own['head.weight'])} classes starts anew"
        )
        weights |= {key: own[key] for key in ("head.weight", "head.bias")}
    return weights


def _resize(table: Tensor, prefix: int, old_rows: int, grid: tuple[int, int], source: str) -> Tensor:
    """Return a position embedding (1, prefix + r · c, D) for `grid`: other bands and frames, linearly."""
    places = table.shape[1] - prefix
    if places % old_rows:
        raise CheckpointError(
            f"{source}: a position embedding of {places} places, no multiple of {old_rows} bands of patches"
        )
    new = rearrange(table[:, prefix:], "1 (r c) d -> 1 r c d", r=old_rows)
    if new.shape[2] != grid[1]:
        new = stretch(new, grid[1])
    if old_rows != grid[0]:
        new = stretch(new.transpose(1, 2), grid[0]).transpose(1, 2)
    return torch.cat([table[:, :prefix], rearrange(new, "1 r c d -> 1 (r c) d")], 1)
