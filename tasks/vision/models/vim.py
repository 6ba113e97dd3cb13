"""The registered sizes of Vim (tasks/vision/vim.py), for 224-pixel images and, with patch 4, for 32-pixel ones.

Source: Zhu et al. 2024, section 3.4 and table 1 (tiny, small, base); nano is ours.
"""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import nn

from mambaverse.errors import UserError
from mambaverse.models import register_model
from mambaverse.tasks.vision.vim import Vim

BUILDER_ARGUMENTS = ("cache_dir", "features_only", "out_indices", "pretrained_cfg", "pretrained_cfg_overlay")


def _cfg(size: int) -> dict[str, Any] | PretrainedCfg:
    return {
        "url": "",
        "num_classes": 1000 if size == 224 else 10,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406) if size == 224 else (0.4914, 0.4822, 0.4465),
        "std": (0.229, 0.224, 0.225) if size == 224 else (0.2470, 0.2435, 0.2616),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
    }


default_cfgs = generate_default_cfgs(
    {f"vim_{size}_patch16_224.untrained": _cfg(224) for size in ("nano", "tiny", "small", "base")}
    | {f"vim_{size}_patch4_32.untrained": _cfg(32) for size in ("nano", "tiny")}
)
_WIDTHS = {"nano": (96, 6), "tiny": (192, 24), "small": (384, 24), "base": (768, 24)}  # embed_dim, depth


def _vim(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    _, size, patch, _ = variant.split("_")
    if pretrained and not ({"pretrained_cfg", "pretrained_cfg_overlay"} & set(overrides)):
        raise UserError(f"model {variant!r}: there are no published weights yet; train it, or load a checkpoint")
    embed_dim, depth = _WIDTHS[size]
    arguments = {"embed_dim": embed_dim, "depth": depth, "patch_size": int(patch.removeprefix("patch")), **overrides}
    feature_cfg = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(Vim, variant, pretrained, feature_cfg=feature_cfg, **arguments)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_nano_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 96 channels and 6 blocks for 224-pixel images, patch 16."""
    return _vim("vim_nano_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-Ti: 192 channels, 24 blocks, 7.148 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_tiny_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_small_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-S: 384 channels, 24 blocks, 25.797 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_small_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_base_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-B: 768 channels, 24 blocks, 97.598 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_base_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_nano_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 96 channels and 6 blocks for 32-pixel images (CIFAR), patch 4."""
    return _vim("vim_nano_patch4_32", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=BUILDER_ARGUMENTS)
@register_with_timm
def vim_tiny_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 192 channels and 24 blocks for 32-pixel images (CIFAR), patch 4."""
    return _vim("vim_tiny_patch4_32", pretrained, **overrides)
