"""Strata: convolutions where an image is large, state spaces where it is smaller, attention beside them at the end.

    image -> residual 3 x 3 convolutions -> grids of tokens: a depthwise convolution, a mixer and an MLP in each block

A mixer's cost grows with the number of tokens, attention's with its square, so that early stages get the former and
late ones may have both. Any mixer by name in each stage: model.mixer=s6, or [vim, [ssd, attention]]. The family is our
own; its parts are those of CoAtNet (Dai et al. 2021), whose early stages are convolutions too, Chu et al. 2021, whose
depthwise convolutions stand for position embeddings, and of MambaVision (Hatamizadeh and Kautz 2024), which has
attention in the last blocks of its late stages.
"""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import nn

from mambaverse.models import register_model
from mambaverse.tasks.vision.factory import BUILDER_ARGUMENTS
from mambaverse.tasks.vision.pyramid import Pyramid, build_pyramid

_SHARED: dict[str, Any] = {
    "stem": "residual",
    "local": 3,
    "mixer_args": {"bissd": {"d_state": 64}, "attention": {"headdim": 32}},
}
_SIZES: dict[str, dict[str, Any]] = {
    "strata_nano_patch4_32": {
        "stem": "residual2",
        "dims": (256,),
        "depths": (6,),
        "mixer": (("bissd", "bissd", "attention"),),
    },
    "strata_tiny_patch4_224": {
        "dims": (64, 128, 256, 512),
        "depths": (2, 2, 9, 3),
        "mixer": ("bissd", "bissd", ("bissd", "bissd", "attention"), ("bissd", "attention")),
    },
    "strata_small_patch4_224": {
        "dims": (80, 160, 320, 640),
        "depths": (2, 2, 12, 3),
        "mixer": ("bissd", "bissd", ("bissd", "bissd", "attention"), ("bissd", "attention")),
    },
    "test_strata": {
        "stem": "residual2",
        "dims": (32, 64),
        "depths": (1, 2),
        "mixer": ("bissd", ("bissd", "attention")),
    },
}
_PIXELS = {"strata_nano_patch4_32": 32, "test_strata": 64}


def _cfg(name: str) -> dict[str, Any] | PretrainedCfg:
    size, spec = _PIXELS.get(name, 224), _SIZES[name]
    last = size // (spec.get("patch_size", 4) * 2 ** (len(spec["dims"]) - 1))
    return {
        "url": "",
        "num_classes": 10 if size == 32 else 1000,
        "input_size": (3, size, size),
        "pool_size": (last, last),
        "crop_pct": 1.0 if size == 32 else 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(name) for name in _SIZES})


def _strata(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    return build_pyramid(Pyramid, variant, pretrained, _SHARED | _SIZES[variant], overrides)


@register_model(domain="vision", model=Pyramid, also=BUILDER_ARGUMENTS)
@register_with_timm
def strata_nano_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Strata for 32 x 32 pixels: convolutions, then 6 blocks of 256 channels on 8 x 8 tokens, 6.55 M parameters."""
    return _strata("strata_nano_patch4_32", pretrained, **overrides)


@register_model(domain="vision", model=Pyramid, also=BUILDER_ARGUMENTS)
@register_with_timm
def strata_tiny_patch4_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Strata for 224 x 224 pixels: 64 to 512 channels, depths 2, 2, 9, 3, 21.6 M parameters."""
    return _strata("strata_tiny_patch4_224", pretrained, **overrides)


@register_model(domain="vision", model=Pyramid, also=BUILDER_ARGUMENTS)
@register_with_timm
def strata_small_patch4_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Strata for 224 x 224 pixels: 80 to 640 channels, depths 2, 2, 12, 3, 37.7 M parameters."""
    return _strata("strata_small_patch4_224", pretrained, **overrides)


@register_model(domain="vision", model=Pyramid, also=BUILDER_ARGUMENTS)
@register_with_timm
def test_strata(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Strata of 32 and 64 channels and depths 1, 2 for 64-pixel images: for tests."""
    return _strata("test_strata", pretrained, **overrides)
