"""From pixels to the first grid of tokens of a pyramid, channels last."""

# No `from __future__ import annotations`: see pyramid.py.
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.backbones.hierarchical import plain_norm
from mambaverse.errors import UserError

STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}  # of the stem's two convolutions, by the side of a patch


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions, each with a norm, GELU between them: (B, C, H, W) -> (B, H/P, W/P, D), rounded up."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: str, eps: float, **dd: Any) -> None:
        super().__init__()
        if patch_size not in STRIDES:
            raise UserError(f"patch_size: the convolutional stem knows 4, 2 and 1, got {patch_size}")
        first, second = STRIDES[patch_size]
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=first, padding=1, **dd)
        self.norm1 = plain_norm(norm, dim // 2, eps, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=second, padding=1, **dd)
        self.norm2 = plain_norm(norm, dim, eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of images x (B, C, H, W)."""
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """Each patch of P x P pixels a token, and a norm: (B, C, H, W) -> (B, H/P, W/P, D), rounded down."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: str, eps: float, **dd: Any) -> None:
        super().__init__()
        if patch_size < 1:
            raise UserError(f"patch_size: expected at least 1, got {patch_size}")
        self.conv1 = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm1 = plain_norm(norm, dim, eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of images x (B, C, H, W)."""
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ResidualStem(nn.Module):
    """Convolutions as in a ResNet where an image is still large: (B, C, H, W) -> (B, H/P, W/P, D), rounded up.

    A 3 x 3 convolution, then for each scale two residual pairs of them and one of stride 2, which doubles the channels;
    the last gives D. Batch norm behind each, GELU between. What P asks for beyond that is the first one's stride.

    Source: the convolutional stages in front of attention are those of Dai et al. 2021, "CoAtNet" (arXiv 2106.04803),
    section 3.2; the pairs are He et al. 2016, figure 2.
    """

    SCALES = 1
    scales: list[tuple[int, int]]  # channels, and pixels a side of a position, where the pairs are

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: str, eps: float, **dd: Any) -> None:
        super().__init__()
        scales, width = self.SCALES, dim // 2**self.SCALES
        if patch_size not in (2**scales, 2 ** (scales + 1)):
            raise UserError(
                f"patch_size: this stem halves its grid {scales} times and knows {2**scales} and {2 ** (scales + 1)}, "
                f"got {patch_size}"
            )
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride=patch_size // 2**scales, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(width, **dd)
        self.act = nn.GELU()
        self.pairs, self.downs = nn.ModuleList(), nn.ModuleList()
        first = patch_size // 2**scales
        self.scales = [(width * 2**i, first * 2**i) for i in range(scales)]
        for i in range(scales):
            self.pairs.append(nn.Sequential(*[_Pair(width, **dd) for _ in range(2)]))
            after = dim if i == scales - 1 else 2 * width
            conv = nn.Conv2d(width, after, 3, stride=2, padding=1, bias=False, **dd)
            self.downs.append(nn.Sequential(conv, nn.BatchNorm2d(after, **dd)))
            width = after

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of images x (B, C, H, W)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm1(self.conv1(x))
        for pairs, down in zip(self.pairs, self.downs):  # noqa: B905 (TorchScript knows no strict=)
            x = down(pairs(self.act(x)))
        return x.permute(0, 2, 3, 1)

    @torch.jit.ignore
    def forward_scales(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens, and what the pairs of each scale give (B, H, W, C)."""
        x = x.contiguous(memory_format=torch.channels_last)
        x, maps = self.norm1(self.conv1(x)), []
        for pairs, down in zip(self.pairs, self.downs, strict=True):
            x = pairs(self.act(x))
            maps.append(x.permute(0, 2, 3, 1))
            x = down(x)
        return x.permute(0, 2, 3, 1), maps

    @torch.jit.ignore
    def prune(self, last: int) -> int:
        """End with the pairs of scale `last`; return their channels."""
        self.pairs, self.downs = self.pairs[: last + 1], self.downs[: last + 1]
        self.downs[last] = nn.Identity()
        return self.scales[last][0]


class DoubleResidualStem(ResidualStem):
    """A `ResidualStem` of two scales."""

    SCALES = 2


class _Pair(nn.Module):
    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


STEMS: dict[str, type[nn.Module]] = {
    "conv": ConvStem,
    "patch": PatchStem,
    "residual": ResidualStem,
    "residual2": DoubleResidualStem,
}
