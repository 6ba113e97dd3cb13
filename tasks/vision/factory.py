"""What the factories of all image models share, beside timm's builder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg
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


def with_own_cfg(variant: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `overrides` with a `pretrained_cfg` that has the variant's own entries where the given one has none.

    timm would take those of ImageNet: images of 224 pixels, its mean and standard deviation.
    """
    given, own = overrides.get("pretrained_cfg"), get_pretrained_cfg(variant)
    if not given or not isinstance(given, Mapping) or own is None:
        return dict(overrides)
    return {**overrides, "pretrained_cfg": {**own.to_dict(remove_source=True), "tag": None, **given}}


def record_arguments(model: nn.Module, overrides: Mapping[str, Any], transient: tuple[str, ...]) -> None:
    """Note what rebuilds `model`, for an export (save_for_hf), as timm.create_model does; not what is `transient`."""
    update_model_args(model, **{k: v for k, v in overrides.items() if k not in (*transient, "device", "dtype")})


def check_indices(indices: Any, count: int, name: str = "indices") -> None:
    """Raise UserError unless `indices` takes some of `count` features as timm has it: the last n, or a list of places.

    None, and what is neither a number nor a list, such as a range, timm takes as it is.
    """
    if isinstance(indices, int):
        sound = 1 <= indices <= count
    elif isinstance(indices, list | tuple):
        sound = len(indices) > 0 and all(isinstance(i, int) and -count <= i < count for i in indices)
    else:
        sound = not isinstance(indices, str | float)
    if not sound:
        places = f"a list of places from {-count} to {count - 1}"
        raise UserError(f"{name}: expected the last 1 to {count}, or {places}, got {indices!r}")
