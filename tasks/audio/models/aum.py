"""The registered sizes of Audio Mamba (tasks/audio/aum.py): aum_{size}_patch{patch}_{mel bands}x{frames}.

1024 frames are 10.24 s (AudioSet, VGGSound, VoxCeleb, EPIC-Sounds), 128 are 1.28 s (Speech Commands).

Source: Erol et al. 2024, section 4 and the authors' released checkpoints (base Fo-Bi; tiny and small Bi-Bi, as Vim);
nano is ours, with patches of all bands and 2 frames: 20 ms a token, and each keeps the whole spectrum, pitch included.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mambaverse.errors import UserError
from mambaverse.models import register_model
from mambaverse.tasks.audio.aum import AuM

_WIDTHS = {"nano": (64, 4), "tiny": (192, 24), "small": (384, 24), "base": (768, 24)}  # embed_dim, depth


def _aum(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    if pretrained:
        raise UserError(
            f"model {variant!r}: there are no published weights in our format; the authors' checkpoints load with "
            "model.checkpoint=FILE"
        )
    _, size, patch, spectrogram = variant.split("_")
    embed_dim, depth = _WIDTHS[size]
    bins, frames = (int(side) for side in spectrogram.split("x"))
    sides = [int(side) for side in patch.removeprefix("patch").split("x")]
    arguments: dict[str, Any] = {
        "embed_dim": embed_dim, "depth": depth, "bins": bins, "frames": frames,
        "patch_size": sides[0] if len(sides) == 1 else sides,
    }  # fmt: skip
    if size == "base" and overrides.get("mixer") is None:
        arguments["direction_type"] = "Fo-Bi"
    return AuM(**{**arguments, **overrides})


@register_model(domain="audio", model=AuM)
def aum_nano_patch128x2_128x128(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM of 64 channels and 4 blocks, a token for every 2 frames: trains on a CPU in minutes."""
    return _aum("aum_nano_patch128x2_128x128", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_nano_patch16_128x128(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM of 64 channels and 4 blocks, square patches, 1.28 s."""
    return _aum("aum_nano_patch16_128x128", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_tiny_patch16_128x128(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-Ti: 192 channels, 24 blocks, Bi-Bi, 1.28 s."""
    return _aum("aum_tiny_patch16_128x128", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_tiny_patch16_128x1024(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-Ti: 192 channels, 24 blocks, Bi-Bi, 10.24 s."""
    return _aum("aum_tiny_patch16_128x1024", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_small_patch16_128x128(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-S: 384 channels, 24 blocks, Bi-Bi, 1.28 s; 25.18 M parameters with 35 classes."""
    return _aum("aum_small_patch16_128x128", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_small_patch16_128x1024(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-S: 384 channels, 24 blocks, Bi-Bi, 10.24 s; 25.54 M parameters with 527 classes."""
    return _aum("aum_small_patch16_128x1024", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_base_patch16_128x128(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-B: 768 channels, 24 blocks, Fo-Bi, 1.28 s; 91.39 M parameters with 35 classes."""
    return _aum("aum_base_patch16_128x128", pretrained, **overrides)


@register_model(domain="audio", model=AuM)
def aum_base_patch16_128x1024(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """AuM-B: 768 channels, 24 blocks, Fo-Bi, 10.24 s; 92.11 M parameters with 527 classes."""
    return _aum("aum_base_patch16_128x1024", pretrained, **overrides)
