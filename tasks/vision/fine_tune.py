"""Weights of one run as the start of another: a head for other classes starts anew, filters of colours are fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from mambaverse.engine.checkpoint import without_prefix
from mambaverse.errors import warn


def adapted(weights: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return `weights` for a model of other classes or channels, where timm's `pretrained_cfg` says what these are.

    Args:
        weights: Under the model's names.
        model: What they are for; one without a `pretrained_cfg` gets them as they are.
        source: Where they are from, for the warning.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    first, head = cfg.get("first_conv"), cfg.get("classifier")
    return fitted(
        without_prefix(weights),
        model,
        source,
        first if isinstance(first, str) else "",
        head if isinstance(head, str) else "",
    )


def fitted(weights: Mapping[str, Tensor], model: nn.Module, source: str, first: str, head: str) -> dict[str, Tensor]:
    """`adapted`, given the names of the first convolution and of the head.

    Filters of colours are added up or repeated, as timm does. A head for other classes is left as it is initialised,
    and one is left out where the model has none.
    """
    weights, own = dict(weights), model.state_dict()
    stem, matrix, bias = f"{first}.weight", f"{head}.weight", f"{head}.bias"
    if head and getattr(model, "num_classes", None) == 0:
        weights = {name: value for name, value in weights.items() if name not in (matrix, bias)}
    if stem in weights and stem in own and weights[stem].ndim == own[stem].ndim == 4:
        channels, given = own[stem].shape[1], weights[stem].shape[1]
        if given not in (0, channels):
            weights[stem] = adapt_input_conv(channels, weights[stem], given)
    if matrix in weights and matrix in own and weights[matrix].ndim and len(weights[matrix]) != len(own[matrix]):
        warn(
            f"{source}: its head knows {len(weights[matrix])} classes and is left out; "
            f"that for {len(own[matrix])} classes starts anew"
        )
        weights |= {key: own[key] for key in (matrix, bias) if key in own}
    return weights
