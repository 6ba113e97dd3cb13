"""Weights files for Vim: those of hustvl/Vim, and our own.

hustvl/Vim   what its training script saves, a dictionary with the weights under "model" and "model_ema"; names are
             ours, but the rows of `pos_embed` stand in the order in which the blocks read the tokens: that of the cls
             token, of number M // 2 or wherever the token was inserted, moves to the front
ours         a plain state dict or a file of timm's training script ("state_dict", "state_dict_ema"), cls first

Either may have been made for another image or patch size, number of channels or of classes. Nothing in the weights
themselves tells one layout from the other, but what `state_dict()` of ours returns carries the model's version, and
torch.save keeps it: so saved, ours are known under "model", too. A copy of ours as a plain dict is not. A state dict
taken out of an original file goes back under the key "model", and timm's own `checkpoint_path`, which takes the weights
out before we see them, is for our files alone. For files of
either layout there are `mambaverse.create_model(..., checkpoint_path=...)`, the config's `model.checkpoint`, and
`timm.create_model(..., pretrained=True, pretrained_cfg_overlay={"file": ...})`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from mambaverse.engine.checkpoint import CheckpointError, kept_version, load_state, read_content, without_prefix
from mambaverse.errors import suggest
from mambaverse.tasks.vision.fine_tune import fitted

if TYPE_CHECKING:
    from mambaverse.tasks.vision.vim import Vim

ORIGINAL_KEYS = ("model", "model_ema")  # the published accuracies are those of "model"
OWN_KEYS = ("state_dict_ema", "state_dict")


def load_vim(model: Vim, path: Path | str, key: str | None = None, partial: bool = False) -> None:
    """Load a weights file into `model`.

    Args:
        model: A Vim whose blocks have the file's sizes.
        path: A safetensors file, or one of torch.save that holds tensors and plain values.
        key: Which weights of a file that has several: "model" or "model_ema", "state_dict" or "state_dict_ema"; None:
            "model" of an original file, "state_dict_ema" of another if there is one.
        partial: Leave out what `model` has not, as one of `features_only` ends early.

    Raises:
        CheckpointError: no such file, damaged, or the weights of another model.
    """
    content = read_content(Path(path))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of weights, got {type(content).__name__}")
    weights = convert(content, model, str(path), key)
    weights = fitted(weights, model, str(path), "patch_embed.proj", "head")
    own = model.state_dict() if partial else weights
    load_state(model, {name: value for name, value in weights.items() if name in own}, str(path))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Vim) -> dict[str, Tensor]:
    """Return weights under the names and in the shapes of `model`; timm fits image channels and classes itself."""
    return convert(state_dict, model, "pretrained weights")


def convert(content: Mapping[str, Any], model: Vim, source: str, key: str | None = None) -> dict[str, Tensor]:
    """Return the weights in `content`, cls first, for the grid and patches of `model`; other arguments: `load_vim`.

    Raises:
        CheckpointError: no weights under `key`, or a position embedding of another shape or of no known grid.
    """
    held = [name for name in (*ORIGINAL_KEYS, *OWN_KEYS) if isinstance(content.get(name), Mapping)]
    if key is not None and key not in held:
        raise CheckpointError(f"{source}: no weights under {key!r}{suggest(key, held)}")
    key = held[0] if key is None and held else key
    inner = content if key is None else content[key]
    weights = without_prefix({str(name): value for name, value in inner.items()})
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        expected = ", ".join((*ORIGINAL_KEYS, *OWN_KEYS))
        raise CheckpointError(f"{source}: holds no weights; expected a state dict, or one under {expected}")
    if "pos_embed" in weights:
        original = key in ORIGINAL_KEYS and kept_version(inner) < model._version
        weights["pos_embed"] = _position(weights, model, source, original)
    name = "patch_embed.proj.weight"
    size = model.patch_embed.patch_size
    if name in weights and weights[name].ndim == 4 and tuple(weights[name].shape[2:]) != tuple(size):
        weights[name] = resample_patch_embed(weights[name], list(size))
    return weights


def _position(weights: Mapping[str, Tensor], model: Vim, source: str, original: bool) -> Tensor:
    """Return the position embedding (1, [cls +] M, D), cls first, resampled for the grid of `model`."""
    table, prefix = weights["pos_embed"], model.num_prefix_tokens
    if table.ndim != 3 or len(table) != 1 or table.shape[1] <= prefix:
        rule = f"pos_embed {tuple(table.shape)}, expected (1, {prefix} cls tokens and the patches, D)"
        raise CheckpointError(f"{source}: weights of another model: {rule}")
    patches = table.shape[1] - prefix
    if original and prefix:
        at = model._cls_index(patches)
        table = torch.cat([table[:, at : at + 1], table[:, :at], table[:, at + 1 :]], dim=1)
    new = list(model.patch_embed.grid_size)
    old = _old_grid(weights, model, patches)
    if old is None:
        rule = f"{patches} places beside {prefix} cls tokens, which are neither a square nor the grid of its images"
        raise CheckpointError(f"{source}: a position embedding of {rule}")
    return resample_abs_pos_embed(table, new, old, num_prefix_tokens=prefix)


def _old_grid(weights: Mapping[str, Tensor], model: Vim, patches: int) -> list[int] | None:
    """Return the grid (H', W') that the file's `patches` places stand on: as recorded, else ours, else a square."""
    filters = weights.get("patch_embed.proj.weight")
    source = getattr(model, "pretrained_model_args", {})
    config = getattr(model, "pretrained_cfg", None) or {}
    own = model.patch_embed
    candidates = [list(own.grid_size)]
    if filters is not None and filters.ndim == 4:
        side = filters.shape[2]
        strides = {source.get("stride") or side, own.stride[0]}
        recorded, nominal = source.get("img_size"), tuple(config.get("input_size") or ())[-2:]
        before = [_grid(recorded, side, stride) for stride in strides] if recorded else []
        candidates = [*before, *candidates, *(_grid(nominal, side, stride) for stride in strides if nominal)]
    square = math.isqrt(patches)
    return next((grid for grid in [*candidates, [square, square]] if math.prod(grid) == patches), None)


def _grid(img_size: Any, patch: int, stride: int) -> list[int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    return [(side - patch) // stride + 1 for side in sides]
