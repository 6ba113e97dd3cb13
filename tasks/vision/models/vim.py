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
from mambaverse.tasks.vision.factory import (
    BUILDER_ARGUMENTS,
    check_indices,
    check_published,
    record_arguments,
    with_own_cfg,
)
from mambaverse.tasks.vision.vim import Vim
from mambaverse.tasks.vision.vim_checkpoints import checkpoint_filter_fn, load_vim

ALSO = (*BUILDER_ARGUMENTS, "feature_cls", "pretrained_strict", "checkpoint_key")
_WIDTHS = {"nano": (96, 6), "tiny": (192, 24), "small": (384, 24), "base": (768, 24)}  # embed_dim, depth
_TEST: dict[str, Any] = {"embed_dim": 32, "depth": 3, "patch_size": 16, "mixer_args": {"vim": {"d_state": 4}}}


def _cfg(size: int) -> dict[str, Any] | PretrainedCfg:
    cifar = size == 32
    return {
        "url": "",
        "num_classes": 10 if cifar else 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 1.0 if cifar else 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.4914, 0.4822, 0.4465) if cifar else (0.485, 0.456, 0.406),
        "std": (0.2470, 0.2435, 0.2616) if cifar else (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
    }


default_cfgs = generate_default_cfgs(
    {f"vim_{size}_patch16_224.untrained": _cfg(224) for size in ("nano", "tiny", "small", "base")}
    | {f"vim_{size}_patch16_stride8_224.untrained": _cfg(224) for size in ("tiny", "small", "base")}
    | {f"vim_{size}_patch4_32.untrained": _cfg(32) for size in ("nano", "tiny")}
    | {"test_vim.untrained": _cfg(64)}
)


def _vim(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    check_published(variant, pretrained, overrides)
    overrides = with_own_cfg(variant, overrides)
    path, key = overrides.pop("checkpoint_path", None), overrides.pop("checkpoint_key", None)
    if key is not None and path is None:
        raise UserError(f"{variant}: checkpoint_key={key!r} names a part of a file; expected checkpoint_path beside it")
    overlay = overrides.get("pretrained_cfg_overlay")
    if overlay and {"file", "url"} & set(overlay):  # what timm unwraps no longer tells whose layout it is in
        overrides["pretrained_cfg_overlay"] = {"custom_load": True, **overlay}
    arguments = {**_arguments(variant), **overrides}
    depth = arguments["depth"]
    out_indices = arguments.pop("out_indices", min(depth, 3))
    if arguments.get("features_only"):
        check_indices(out_indices, depth, "out_indices")
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    model = build_model_with_cfg(
        Vim, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **arguments
    )
    record_arguments(model, overrides, (*ALSO, "pretrained_model_args"))
    if path is not None:
        inner = getattr(model, "model", model)  # of features_only, which has no head and may end early
        load_vim(inner, path, key, partial=inner is not model)
    return model


def _arguments(variant: str) -> dict[str, Any]:
    """Return what a name says: vim_<size>_patch<side>[_stride<pixels>]_<image size>."""
    if variant == "test_vim":
        return dict(_TEST)
    _, size, *rest = variant.split("_")
    embed_dim, depth = _WIDTHS[size]
    numbers = {"patch_size": int(rest[0].removeprefix("patch"))}
    if rest[1].startswith("stride"):
        numbers["stride"] = int(rest[1].removeprefix("stride"))
    return {"embed_dim": embed_dim, "depth": depth, **numbers}


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_nano_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 96 channels and 6 blocks for 224-pixel images, patch 16."""
    return _vim("vim_nano_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-Ti: 192 channels, 24 blocks, 7.148 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_tiny_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_small_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-S: 384 channels, 24 blocks, 25.797 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_small_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_base_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-B: 768 channels, 24 blocks, 97.598 M parameters, 224-pixel images, patch 16."""
    return _vim("vim_base_patch16_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_nano_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 96 channels and 6 blocks for 32-pixel images (CIFAR), patch 4."""
    return _vim("vim_nano_patch4_32", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_tiny_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 192 channels and 24 blocks for 32-pixel images (CIFAR), patch 4."""
    return _vim("vim_tiny_patch4_32", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-Ti for fine-tuning: patches of 16 every 8 pixels, 729 tokens, 7.250 M parameters, 224-pixel images."""
    return _vim("vim_tiny_patch16_stride8_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_small_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-S for fine-tuning: patches of 16 every 8 pixels, 729 tokens, 26.001 M parameters, 224-pixel images."""
    return _vim("vim_small_patch16_stride8_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def vim_base_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-B for fine-tuning: patches of 16 every 8 pixels, 729 tokens, 98.008 M parameters, 224-pixel images."""
    return _vim("vim_base_patch16_stride8_224", pretrained, **overrides)


@register_model(domain="vision", model=Vim, also=ALSO)
@register_with_timm
def test_vim(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim of 32 channels and 3 blocks for 64-pixel images: for tests alone."""
    return _vim("test_vim", pretrained, **overrides)
