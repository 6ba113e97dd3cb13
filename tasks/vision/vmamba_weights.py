"""Parameters of VMamba's authors under our names: their training code, their single file, and their first version.

    theirs                                                            ours
    patch_embed.{0, 2, 5, 7}  (v0: patch_embed.{0, 2} or .proj, .norm)  patch_embed.{conv1, norm1, conv2, norm2}
    layers.i.blocks.j.{norm, op, norm2, mlp}  (v0: ln_1, self_attention)  layers.i.blocks.j.{norm, mixer, norm2, mlp}
    layers.i.downsample.{1, 3}, behind stage i                        layers.i+1.downsample.{conv, norm}, before it
    layers.i.downsample.{1, 2}  (v0; or .norm, .reduction)            layers.i+1.downsample.{norm, reduction}
    classifier.{norm, head}  (v0: norm, head)                         norm_f, head

Their single file keeps what SS2D has four of in one matrix: `x_proj.weight` (4 (R + 2N), E) is `x_proj_weight`
(4, R + 2N, E), and `dt_projs.weight` (4 E, R) is `dt_projs_weight` (4, E, R). Linear maps may come as 1 x 1
convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mambaverse.engine.checkpoint import without_prefix
from mambaverse.tasks.vision.fine_tune import fitted

_ORDERS = 4
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^classifier\.norm\.", "norm_f."),
        (r"^classifier\.head\.", "head."),
        (r"^norm\.", "norm_f."),
        (r"^patch_embed\.(0|proj)\.", "patch_embed.conv1."),
        (r"^patch_embed\.(2|norm)\.", "patch_embed.norm1."),
        (r"^patch_embed\.5\.", "patch_embed.conv2."),
        (r"^patch_embed\.7\.", "patch_embed.norm2."),
        (r"\.(op|self_attention)\.", ".mixer."),
        (r"\.ln_1\.", ".norm."),
        (r"\.ln_2\.", ".norm2."),
        (r"\.x_proj\.weight$", ".x_proj_weight"),
        (r"\.dt_projs\.weight$", ".dt_projs_weight"),
    )
]
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.(1|2|3|norm|reduction)\.(.+)$")
_THEIRS = re.compile(r"^patch_embed\.(0|proj)\.|\.(op|self_attention)\.|^classifier\.")


def rename(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters under our names and in our shapes; ours come back as they are."""
    if not any(_THEIRS.search(name) for name in weights):
        return dict(weights)
    renamed = {}
    for name, value in weights.items():
        new = _rename_downsample(name, weights)
        for pattern, replacement in _RULES:
            new = pattern.sub(replacement, new)
        renamed[new] = _reshape(new, value)
    return renamed


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters in a checkpoint of theirs: the averaged ones if there are any, else the last ones."""
    for key in ("model_ema", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def convert(weights: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return weights of theirs or ours for a `VMamba` of other channels or classes.

    Filters of colours are added up or repeated, as timm does. A head for other classes is left as it is initialised.

    Args:
        weights: Under the names of any version.
        model: What they are for.
        source: Where they are from, for the warning.
    """
    return fitted(rename(without_prefix(weights)), model, source, "patch_embed.conv1", "head")


def _rename_downsample(name: str, weights: Mapping[str, Any]) -> str:
    found = _DOWNSAMPLE.match(name)
    if found is None:
        return name
    stage, part, parameter = found.groups()
    first = weights.get(f"layers.{stage}.downsample.1.weight")
    by_merging = first is None or first.ndim < 2  # a norm comes first, then the projection
    numbered = {"1": "norm", "2": "reduction"} if by_merging else {"1": "conv", "3": "norm"}
    return f"layers.{int(stage) + 1}.downsample.{numbered.get(part, part)}.{parameter}"


def _reshape(name: str, value: Any) -> Any:
    """Return a parameter in our shape; what has none of their shapes as it is, for `load_state` to refuse."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if name.endswith((".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight")):
        return value.flatten(1)
    if name.endswith((".x_proj_weight", ".dt_projs_weight")) and value.ndim != 3 and len(value) % _ORDERS == 0:
        return value.flatten(1).unflatten(0, (_ORDERS, -1))
    return value
