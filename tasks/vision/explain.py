"""What an image model looks at: the numbers behind the pictures of `mambaverse explain`, for any image model.

- what speaks for the predicted class: integrated gradients from the mean colour, summed over the channels;
- the effective receptive field of the token in the middle, of the last feature map that the model has;
- Δ of each of our mixers, laid on the grid of its tokens, whatever their order and wherever the cls token stands.

Sources: see mambaverse/attribution.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.attribution import LayerSteps, integrated_gradients, receptive_field, step_sizes_of
from mambaverse.tasks.vision.vim import Vim

COVERED = 0.95  # of a receptive field: how many pixels hold so much of it


@dataclass
class DeltaMap:
    """Δ of one mixer on the grid of its tokens.

    Attributes:
        layer: Where the mixer is: "layer 3", "stage 1, block 2".
        maps: Mean over the channels, (H, W) by the name of the scan.
        cls: Likewise at the cls token, if there is one, as a multiple of the mean over the others.
    """

    layer: str
    maps: dict[str, Tensor]
    cls: float | None = None


@dataclass
class Explanation:
    """What is drawn of one image.

    Attributes:
        shares: What each pixel adds to the score of the predicted class (H, W).
        reach: Effective receptive field of the middle token (H, W), or None if the model has no feature map.
        middle: Where that token is, in pixels (down, right).
        covered: Share of the pixels that hold `COVERED` of it.
        deltas: Of each mixer with a Δ.
        without: Names of the mixers that have none.
        note: Why there are no Δ maps, if so.
    """

    shares: Tensor
    reach: Tensor | None
    covered: float
    middle: tuple[float, float] = (0.0, 0.0)
    deltas: list[DeltaMap] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    note: str = ""


def explain_image(model: nn.Module, first: nn.Module, image: Tensor, label: int) -> Explanation:
    """Look at one normalised image.

    Args:
        model: Whose scores are explained: image (B, C, H, W) -> (B, classes), in eval mode.
        first: The same, or of an ensemble the member whose receptive field and Δ are shown.
        image: (C, H, W) on the model's device.
        label: The class whose score is explained.
    """
    shares = integrated_gradients(lambda x: model(x)[:, label], image, torch.zeros_like(image)).sum(0)
    reach, middle = None, (0.0, 0.0)
    with torch.no_grad():
        grid = feature_map(first, image[None])
    if grid is not None:
        row, column = grid.shape[2] // 2, grid.shape[3] // 2
        sides = [side / count for side, count in zip(image.shape[1:], grid.shape[2:], strict=True)]
        middle = ((row + 0.5) * sides[0] - 0.5, (column + 0.5) * sides[1] - 0.5)
        reach = receptive_field(lambda x: _map_of(first, x)[:, :, row, column], image).square().sum(0).sqrt()
    layers = step_sizes_of(first, lambda: first(image[None]))
    placed = [(layer, place_tokens(first, layer)) for layer in layers if layer.sizes]
    return Explanation(
        shares=shares.cpu(),
        reach=None if reach is None else reach.cpu(),
        covered=0.0 if reach is None else share_covering(reach, COVERED),
        middle=middle,
        deltas=[found for _, found in placed if found is not None],
        without=sorted({_kind(layer.mixer) for layer in layers if not layer.sizes}),
        note=_why_none(layers, any(found is not None for _, found in placed)),
    )


def feature_map(model: nn.Module, x: Tensor) -> Tensor | None:
    """Return the last feature map (B, C, H', W') of images x (B, C, H, W), where a model has it before its last norm.

    None if the model has no feature map: neither timm's `forward_intermediates`, nor `forward_features` of 4 axes. A
    norm would not do: the sum over the channels behind a fresh LayerNorm is the same everywhere.
    """
    own: Any = model  # timm's, ours, or any other
    if hasattr(model, "forward_intermediates"):
        grid = own.forward_intermediates(x, indices=1, output_fmt="NCHW", intermediates_only=True)[-1]
    elif hasattr(model, "forward_features"):
        grid = own.forward_features(x)
        if grid.ndim != 4:
            return None
        if getattr(own, "output_fmt", "NCHW") == "NHWC":
            grid = grid.permute(0, 3, 1, 2)
    else:
        return None
    return grid


def place_tokens(model: nn.Module, layer: LayerSteps) -> DeltaMap | None:
    """Lay the Δ of one image's tokens on their grid; None if the model does not say what the grid is."""
    length = next(iter(layer.sizes.values())).shape[1]
    grid, cls = layer.spatial_shape, None
    if isinstance(model, Vim) and length == model.patch_embed.num_patches + model.num_prefix_tokens:
        grid, cls = model.patch_embed.grid_size, model.num_prefix_tokens
    if grid is None or grid[0] * grid[1] != length - (cls or 0):
        return None
    maps, marked = {}, []
    for scan, dt in layer.sizes.items():
        tokens = model._cls_first(dt[..., None])[..., 0] if isinstance(model, Vim) else dt
        patches = tokens[0, cls or 0 :]
        maps[scan] = patches.unflatten(0, tuple(grid)).cpu()
        if cls:
            marked.append((tokens[0, 0] / patches.mean()).item())
    return DeltaMap(layer_title(layer.name), maps, sum(marked) / len(marked) if marked else None)


def share_covering(field_: Tensor, share: float) -> float:
    """Return the smallest share of the pixels that together hold `share` of a field's sum."""
    sorted_, total = field_.flatten().sort(descending=True).values.double(), field_.double().sum()
    return (int((sorted_.cumsum(0) < share * total).sum()) + 1) / field_.numel()


def layer_title(name: str) -> str:
    """Return "layers.3.mixer" as "layer 4", "layers.0.blocks.1.mixer" as "stage 1, block 2"."""
    numbers = [int(part) + 1 for part in name.split(".") if part.isdigit()]
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    return f"stage {numbers[0]}, block {numbers[1]}" if len(numbers) == 2 else name


def _why_none(layers: list[LayerSteps], placed: bool) -> str:
    if placed:
        return ""
    if not layers:
        return "this model has no mixer of mambaverse, and so no Δ"
    if not any(layer.sizes for layer in layers):
        kinds = ", ".join(sorted({_kind(layer.mixer) for layer in layers}))
        return f"{kinds}: no Δ that depends on the token"
    return "the model does not say on which grid its tokens lie"


def _kind(mixer: Any) -> str:
    inner = getattr(mixer, "fwd", None)
    return type(mixer).__name__ if inner is None else f"{type(inner).__name__} in two directions"


def _map_of(model: nn.Module, x: Tensor) -> Tensor:
    grid = feature_map(model, x)
    assert grid is not None
    return grid
