"""Peers for small images from timm, as `model.name=benchmarks.cifar10_peers:resnet18`."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn


def resnet18(pretrained: bool = False, img_size: int = 32, **overrides: Any) -> nn.Module:
    """Return timm's ResNet-18 with the stem of small images: a 3 x 3 convolution of stride 1, no pooling."""
    model = timm.create_model("resnet18", pretrained=pretrained, **overrides)
    model.conv1 = nn.Conv2d(overrides.get("in_chans", 3), 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(pretrained: bool = False, img_size: int = 32, **overrides: Any) -> nn.Module:
    """Return timm's ViT of 6.35 M parameters, near strata_nano_patch4_32: patches of 4, width 256, 8 blocks."""
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=pretrained, img_size=img_size, patch_size=4, embed_dim=256, depth=8,
        num_heads=8, **overrides,
    )  # fmt: skip
