"""The registered sizes of the raw-waveform classifier (tasks/audio/raw.py); both are ours."""

from __future__ import annotations

from typing import Any

from torch import nn

from mambaverse.errors import UserError
from mambaverse.models import register_model
from mambaverse.tasks.audio.raw import AudioRaw

_WIDTHS = {"nano": (64, 4), "tiny": (128, 6)}  # embed_dim, depth


def _raw(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    if pretrained:
        raise UserError(f"model {variant!r}: there are no published weights yet; train it, or load a checkpoint")
    embed_dim, depth = _WIDTHS[variant.removeprefix("audio_raw_")]
    return AudioRaw(**{"embed_dim": embed_dim, "depth": depth, **overrides})


@register_model(domain="audio", model=AudioRaw)
def audio_raw_nano(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Waveforms, a token for every 10 ms at 16 kHz, 64 channels and 4 blocks."""
    return _raw("audio_raw_nano", pretrained, **overrides)


@register_model(domain="audio", model=AudioRaw)
def audio_raw_tiny(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Waveforms, a token for every 10 ms at 16 kHz, 128 channels and 6 blocks."""
    return _raw("audio_raw_tiny", pretrained, **overrides)
