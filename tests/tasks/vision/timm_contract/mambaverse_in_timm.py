"""A pytest plugin that points timm's own tests at our image models.

timm's test modules choose their models when they are imported, by `timm.list_models`, which this replaces before; the
lists of models that timm leaves out are not ours and stay empty. Tests written for one model of timm's that promise
something of every model (NEIGHBOURS) get ours instead. All other tests are deselected.

MAMBAVERSE_TIMM_MODELS is a wildcard of the models to take; all of them if it is not set.
"""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch

from mambaverse.timm import VISION_MODELS

OURS = [name for name in VISION_MODELS if fnmatch.fnmatch(name, os.environ.get("MAMBAVERSE_TIMM_MODELS", "*"))]
TIMMS_LIST = timm.list_models
IN_PLACE_OF_VIT = "model_in_place_of_vit"  # name of the parameter


@functools.cache
def on_meta(name: str) -> Any:
    """Return the model without its numbers."""
    return timm.create_model(name, device="meta").eval()


@functools.cache
def keeps_tokens(name: str) -> bool:
    """Whether features are tokens (B, L, D), as a vision transformer's, not a map: timm calls it "non-standard"."""
    model = on_meta(name)
    return model.forward_features(torch.zeros(1, *model.default_cfg["input_size"], device="meta")).ndim == 3


def stands_for_vit(name: str) -> bool:
    """Whether images of 32 x 48 pixels are patches of 16 x 16, side by side, to this model."""
    stem = getattr(on_meta(name), "patch_embed", None)
    sides = getattr(stem, "patch_size", None), getattr(getattr(stem, "proj", None), "stride", None)
    return keeps_tokens(name) and sides == ((16, 16), (16, 16))


@functools.cache
def size(name: str) -> int | None:
    """Return the side of the images of a model that takes one size alone, None for any other."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None, f"{name} has no entry in its module's default_cfgs"
    return config.input_size[-1] if config.fixed_input_size else None


def list_models(
    filter: Any = "",
    module: Any = "",
    pretrained: bool = False,
    exclude_filters: Any = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """As timm's, of our models alone; timm's patterns of token models mean ours, its other patterns mean timm's."""
    names = TIMMS_LIST(pretrained=pretrained, name_matches_cfg=name_matches_cfg, include_tags=include_tags)
    names = [name for name in names if name.split(".")[0] in OURS]
    if "vit_*" in exclude_filters:
        return [name for name in names if not keeps_tokens(name.split(".")[0])]
    if "vit_*" in filter:
        return [name for name in names if keeps_tokens(name.split(".")[0])]
    return names if not filter or filter == "*" else []


timm.list_models = list_models


def sized(*rest: Any) -> Callable[[], list[tuple]]:
    """Return the rows (name, {img_size: 64 where there is one}, *rest)."""
    return lambda: [(name, {"img_size": 64} if size(name) else {}, *rest) for name in OURS]


def small() -> list[str]:
    """Return the models that take the images of 64 pixels which a test makes."""
    return [name for name in OURS if size(name) in (64, None)]


NEIGHBOURS: dict[str, Callable[[], list]] = {
    "test_prune_intermediate_layers_params_used": lambda: OURS,
    "test_pruned_features_torchscript": lambda: [name for name in OURS if size(name)],
    "test_model_init_weights_after_to_empty": sized(),
    "test_default_resize_hub_roundtrip": lambda: [(name, {}, n, 2 * n) for name in OURS if (n := size(name))],
    "test_export_tracks_reset_pool_in_head": lambda: [(name, 3, "avg") for name in small()],
    "test_export_tracks_reset_classifier_structure": lambda: [
        (name, {}, pool, None) for name in OURS for pool in ("avg", None, "")
    ],
}
# These build their model by the module's `_vit`, of 32 x 48 pixels and patches of 16.
THROUGH_VIT = (
    "test_runtime_resolution_rejects_incompatible_explicit_requests",
    "test_adapted_resized_model_hub_roundtrip",
    "test_export_rejects_conflicting_model_metadata",
    "test_model_traits_are_independent_and_follow_resize_and_head_reset",
    "test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """While a test of THROUGH_VIT runs, let its module build our model where it would build a vision transformer."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if (name := parameters.get(IN_PLACE_OF_VIT)) is None:
        return (yield)
    module: Any = item.getparent(pytest.Module).obj  # type: ignore[union-attr]
    timms, module._vit = module._vit, lambda **arguments: timm.create_model(name, img_size=(32, 48), **arguments)
    try:
        return (yield)
    finally:
        module._vit = timms


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the models of timm's that a test names by ours."""
    name = metafunc.function.__name__
    marks = metafunc.definition.own_markers
    if name in NEIGHBOURS:
        (at,) = (i for i, mark in enumerate(marks) if mark.name == "parametrize" and "name" in mark.args[0])
        marks[at] = pytest.mark.parametrize(marks[at].args[0], NEIGHBOURS[name]()).mark
    if name in THROUGH_VIT:
        metafunc.fixturenames.append(IN_PLACE_OF_VIT)
        metafunc.parametrize(IN_PLACE_OF_VIT, [model for model in OURS if stands_for_vit(model)])
        if "use_naflex" in metafunc.fixturenames:  # another architecture of timm's: [False] is left
            (at,) = (i for i, mark in enumerate(marks) if mark.name == "parametrize")
            marks[at] = pytest.mark.parametrize("use_naflex", [False]).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is no test of a model of ours."""
    ours: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        parameters = getattr(item, "callspec", None)
        values = [] if parameters is None else [v for v in parameters.params.values() if isinstance(v, str)]
        (ours if any(value.split(".")[0] in OURS for value in values) else others).append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=others)
