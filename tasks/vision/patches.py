"""Patches of an image as tokens: a convolution whose windows stand side by side, or overlap by a smaller stride.

    (B, C, H, W) -> (B, D, 1 + (H - p) / s, 1 + (W - p) / s)        p: side of a patch, s: stride

Source: Zhu et al. 2024, "Vision Mamba", sections 3.2 (patches) and 4.1 (fine-tuning with stride 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm.layers
from timm.layers.trace_utils import _assert
from timm.models import register_notrace_function
from torch import Tensor

from mambaverse.blocks import check_counts
from mambaverse.errors import UserError
from mambaverse.registry import is_a


class PatchEmbed(timm.layers.PatchEmbed):
    """timm's patch embedding with a stride of its own; its filters are `proj`.

    Args:
        img_size: Height and width of the images in pixels, or one number for both.
        patch_size: Side p of a square patch in pixels.
        stride: Pixels s from one patch to the next; None: p.
        in_chans: Image channels C.
        embed_dim: Channels D of a token.
        strict_img_size: Whether `img_size` is the only size; only recorded here, for those who ask.
        factory: device and dtype of the parameters.

    Raises:
        UserError: a stride that leaves pixels out, sides that are no pixels, or images that the patches do not cover
            exactly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int | None,
        in_chans: int,
        embed_dim: int,
        strict_img_size: bool = True,
        **factory: Any,
    ) -> None:
        check_counts(1, patch_size=patch_size)
        step = patch_size if stride is None else stride
        if not 1 <= step <= patch_size:
            raise UserError(f"stride: expected 1 to patch_size = {patch_size} pixels, got {step}")
        sides = _sides("img_size", img_size)
        check_sides("img_size", sides, (patch_size, patch_size), (step, step))
        self.stride = (step, step)  # read by the base class through _init_img_size
        super().__init__(
            sides, patch_size, in_chans, embed_dim, flatten=False, strict_img_size=strict_img_size, **factory
        )
        self.proj.stride = self.stride

    def forward(self, x: Tensor) -> Tensor:
        """Turn images (B, C, H, W) into a map of tokens (B, D, H', W')."""
        _assert((x.shape[2] - self.patch_size[0]) % self.stride[0] == 0, "image height does not fit the patches")
        _assert((x.shape[3] - self.patch_size[1]) % self.stride[1] == 0, "image width does not fit the patches")
        return self.proj(x)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image or patch size, filters resampled; patches that stood side by side still do.

        Raises:
            UserError: sides that are no pixels, images that the patches do not cover exactly, or patches that are not
                square.
        """
        patch, stride = self.patch_size, self.stride
        if patch_size is not None:
            patch = _sides("patch_size", patch_size)
            if len(set(patch)) > 1:
                raise UserError(f"patch_size: expected one number, or twice the same, got {patch}")
            step = patch[0] if self.stride == self.patch_size else min(self.stride[0], patch[0])
            stride = (step, step)
        new = self.img_size if img_size is None else img_size
        new = _sides("img_size", new)
        check_sides("img_size", new, patch, stride)
        self.stride = stride
        super().set_input_size(img_size=new, patch_size=patch)
        self.proj.stride = self.stride

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        """Return how many pixels one token stands for: the stride."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (H', W') of the tokens of an image of `img_size` (H, W)."""
        return (
            (img_size[0] - self.patch_size[0]) // self.stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.stride[1] + 1,
        )

    def _init_img_size(self, img_size: Any) -> Any:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = PatchEmbed.dynamic_feat_size(self, size)
        return size, grid, grid[0] * grid[1]


def _sides(what: str, size: Any) -> tuple[int, int]:
    """Return height and width of a `size`, which is both or one number of pixels."""
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(sides) != 2 or not all(is_a(side, int) and side >= 1 for side in sides):
        raise UserError(f"{what}: expected a number of pixels from 1, or height and width, got {size!r}")
    return sides[0], sides[1]


@register_notrace_function
def check_images(
    x: Tensor, in_chans: int, size: Sequence[int] | None, patch: Sequence[int], stride: Sequence[int]
) -> None:
    """Raise a UserError unless x is (B, in_chans, H, W), of `size` (H, W) or, where that is None, of any that fits."""
    height, width = ("H", "W") if size is None else size
    if x.ndim != 4 or x.shape[1] != in_chans or (size is not None and tuple(x.shape[2:]) != tuple(size)):
        raise UserError(
            f"expected images of shape (B, {in_chans}, {height}, {width}), got {tuple(x.shape)}; "
            "in_chans=, img_size= and dynamic_img_size=True change what the model takes"
        )
    if size is None:
        check_sides(f"images of shape {tuple(x.shape)}", x.shape[2:], patch, stride)


def check_sides(what: str, sides: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> None:
    """Raise a UserError, with the nearest side that fits, unless patches cover every side exactly."""
    for side, p, s in zip(sides, patch, stride, strict=True):
        if side < p or (side - p) % s:
            near = p + s * max(0, (2 * (side - p) + s) // (2 * s))  # of two, the larger
            rule = f"no multiple of patch_size {p}" if p == s else f"not covered by patches of {p} every {s} pixels"
            raise UserError(f"{what}: {side} is {rule}; the nearest is {near}")
