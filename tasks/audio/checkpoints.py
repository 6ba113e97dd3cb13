"""Weights of other code for Audio Mamba: those of its authors, and of Vision Mamba's, from which they began.

Audio Mamba     names as ours, perhaps behind "module."; `pos_embed.pos_embed` with the cls token's row first, as ours
Vision Mamba    what hustvl/Vim's training script saved, under "model": `pos_embed` in the order of the sequence, where
                the row of the cls token is the middle one and moves to the front; in our own files of a `vim_*` it
                comes first. The filters of red, green and blue are averaged

Another number of frames stretches the position embedding; a head for other classes is left as it is initialised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mambaverse.engine.checkpoint import (
    CheckpointError,
    find_weights,
    kept_version,
    load_state,
    read_content,
    without_prefix,
    wrapper_of,
)
from mambaverse.errors import warn
from mambaverse.tasks.audio.aum import AuM, stretch


def load_aum(model: nn.Module, path: Path) -> None:
    """Load the weights file `path` into `model`; other models than AuM need their own names and shapes.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    content = read_content(path)
    weights = find_weights(content, path)
    if isinstance(model, AuM):
        weights = convert(weights, model, str(path), cls_first=not _is_original(content))
    load_state(model, weights, str(path))


def convert(weights: dict[str, Tensor], model: AuM, source: str, cls_first: bool) -> dict[str, Tensor]:
    """Return weights of Audio Mamba or Vision Mamba under the names and in the shapes of `model`.

    Args:
        weights: By name.
        model: Of the sizes wanted.
        source: Their file, for messages.
        cls_first: Whether the cls token's row comes first in the positions of a Vision Mamba.

    Raises:
        CheckpointError: a position embedding that is none.
    """
    weights = without_prefix(weights)
    rows, columns = model.pos_embed.grid
    prefix = model.pos_embed.prefix
    name, filters, old_rows = "pos_embed.pos_embed", "patch_embed.proj.weight", rows
    if "pos_embed" in weights and filters in weights and weights[filters].ndim == 4:
        table = _table(weights.pop("pos_embed"), prefix, source)
        if prefix and not cls_first:
            middle = (table.shape[1] - 1) // 2
            table = torch.cat([table[:, middle : middle + 1], table[:, :middle], table[:, middle + 1 :]], 1)
        weights[name] = table
        old_rows = round((table.shape[1] - prefix) ** 0.5)  # images are square
        weights[filters] = weights[filters].mean(1, keepdim=True)
    if name in weights and weights[name].shape != model.pos_embed.pos_embed.shape:
        weights[name] = _resize(_table(weights[name], prefix, source), prefix, old_rows, (rows, columns), source)
    own = model.state_dict()
    if "head.weight" in own and "head.weight" in weights and weights["head.weight"].shape != own["head.weight"].shape:
        warn(
            f"{source}: its head knows {len(weights['head.weight'])} classes and is left out; "
            f"that for {len(own['head.weight'])} classes starts anew"
        )
        weights |= {key: own[key] for key in own if key in weights and key.startswith(("head.", "wide."))}
    return weights


def _is_original(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one that hustvl/Vim's training script saves: the model of ours states a version."""
    key = wrapper_of(content)
    return key in ("model", "model_ema") and kept_version(content[key]) == 1


def _table(table: Tensor, prefix: int, source: str) -> Tensor:
    """Return a position embedding (1, prefix + M, D); CheckpointError if it is none."""
    if table.ndim != 3 or len(table) != 1 or table.shape[1] <= prefix:
        rule = f"(1, {prefix} cls tokens and the patches, D)"
        raise CheckpointError(f"{source}: weights of another model: pos_embed {tuple(table.shape)}, expected {rule}")
    return table


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
