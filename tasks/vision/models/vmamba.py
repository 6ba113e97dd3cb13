"""The registered sizes of VMamba (tasks/vision/vmamba.py).

`s1l8` means E / D = 1 in SS2D and 8 blocks in the third stage; `v0` is the first version: a gate and 16 states in SS2D,
no MLP, patches and merged patches instead of convolutions. Stochastic depth is off by default; the authors train with
drop_path_rate 0.2 (tiny), 0.3 (small) and 0.5 to 0.6 (base).

Source: Liu et al. 2024, section 5 and table 1; sizes of the authors' released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import nn

from mambaverse.models import register_model
from mambaverse.tasks.vision.factory import BUILDER_ARGUMENTS
from mambaverse.tasks.vision.pyramid import build_pyramid
from mambaverse.tasks.vision.vmamba import VMamba
from mambaverse.tasks.vision.vmamba_weights import convert, rename, unwrap

_TINY = 96  # pixels of test_vmamba
_V0: dict[str, Any] = {
    "mixer_args": {"ss2d": {"d_state": 16, "expand": 2.0, "gate": "silu", "conv_bias": True}},
    "stem": "patch",
    "downsample": "merge",
    "mlp_ratio": 0.0,
}
_SIZES: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s1l8_224": {"dims": 96, "depths": (2, 2, 8, 2)},
    "vmamba_tiny_s2l5_224": {"dims": 96, "depths": (2, 2, 5, 2), "mixer_args": {"ss2d": {"expand": 2.0}}},
    "vmamba_small_s1l20_224": {"dims": 96, "depths": (2, 2, 20, 2)},
    "vmamba_small_s2l15_224": {"dims": 96, "depths": (2, 2, 15, 2), "mixer_args": {"ss2d": {"expand": 2.0}}},
    "vmamba_base_s1l20_224": {"dims": 128, "depths": (2, 2, 20, 2)},
    "vmamba_base_s2l15_224": {"dims": 128, "depths": (2, 2, 15, 2), "mixer_args": {"ss2d": {"expand": 2.0}}},
    "vmamba_tiny_v0_224": {"dims": 96, "depths": (2, 2, 9, 2), **_V0},
    "vmamba_small_v0_224": {"dims": 96, "depths": (2, 2, 27, 2), **_V0},
    "vmamba_base_v0_224": {"dims": 128, "depths": (2, 2, 27, 2), **_V0},
    "test_vmamba": {"dims": 16, "depths": (1, 1, 2, 1)},
}


def _cfg(size: int) -> dict[str, Any] | PretrainedCfg:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        "paper_ids": "arXiv:2401.10166",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg(_TINY if name == "test_vmamba" else 224) for name in _SIZES}
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the parameters of a checkpoint, of the authors or ours, as `model` calls them."""
    return rename(unwrap(state_dict))


def _vmamba(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    return build_pyramid(VMamba, variant, pretrained, _SIZES[variant], overrides, checkpoint_filter_fn, convert)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_tiny_s1l8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-T, version 2: 96 to 768 channels, depths 2, 2, 8, 2, E / D = 1, 30.249 M parameters."""
    return _vmamba("vmamba_tiny_s1l8_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_tiny_s2l5_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-T, version 2: 96 to 768 channels, depths 2, 2, 5, 2, E / D = 2, 30.706 M parameters."""
    return _vmamba("vmamba_tiny_s2l5_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_small_s1l20_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-S, version 2: 96 to 768 channels, depths 2, 2, 20, 2, E / D = 1, 49.013 M parameters."""
    return _vmamba("vmamba_small_s1l20_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_small_s2l15_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-S, version 2: 96 to 768 channels, depths 2, 2, 15, 2, E / D = 2, 50.148 M parameters."""
    return _vmamba("vmamba_small_s2l15_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_base_s1l20_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-B, version 2: 128 to 1024 channels, depths 2, 2, 20, 2, E / D = 1, 86.615 M parameters."""
    return _vmamba("vmamba_base_s1l20_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_base_s2l15_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-B, version 2: 128 to 1024 channels, depths 2, 2, 15, 2, E / D = 2, 88.558 M parameters."""
    return _vmamba("vmamba_base_s2l15_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_tiny_v0_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-T, version 0: 96 to 768 channels, depths 2, 2, 9, 2, 22.893 M parameters."""
    return _vmamba("vmamba_tiny_v0_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_small_v0_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-S, version 0: 96 to 768 channels, depths 2, 2, 27, 2, 44.417 M parameters."""
    return _vmamba("vmamba_small_v0_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def vmamba_base_v0_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba-B, version 0: 128 to 1024 channels, depths 2, 2, 27, 2, 76.254 M parameters."""
    return _vmamba("vmamba_base_v0_224", pretrained, **overrides)


@register_model(domain="vision", model=VMamba, also=BUILDER_ARGUMENTS)
@register_with_timm
def test_vmamba(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """VMamba of 16 to 128 channels and depths 1, 1, 2, 1 for 96-pixel images: for tests."""
    return _vmamba("test_vmamba", pretrained, **overrides)
