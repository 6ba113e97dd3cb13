"""What the factories of all image models share, beside timm's builder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models._input import update_model_args
from torch import nn

from mambaverse.errors import UserError

# Arguments of timm's builder, and of ours, that are none of a model's class.
BUILDER_ARGUMENTS = (
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


def check_published(variant: str, pretrained: bool, overrides: Mapping[str, Any]) -> None:
    """Raise UserError if weights are asked for that neither `pretrained_cfg` nor its overlay names."""
    if pretrained and not ({"pretrained_cfg", "pretrained_cfg_overlay"} & set(overrides)):
        raise UserError(f"model {variant!r}: there are no published weights yet; train it, or load a checkpoint")


def record_arguments(model: nn.Module, overrides: Mapping[str, Any], transient: tuple[str, ...]) -> None:
    """Note what rebuilds `model`, for an export (save_for_hf), as timm.create_model does; not what is `transient`."""
    update_model_args(model, **{k: v for k, v in overrides.items() if k not in (*transient, "device", "dtype")})
