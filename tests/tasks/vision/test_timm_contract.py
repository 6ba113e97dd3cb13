"""Every image model passes timm's own tests: a small variant of each family, `test_*`, and on demand every model.

`make timm-contract` (pytest -m slow) runs them all; one: MAMBAVERSE_TIMM_MODELS="vim_tiny*" make timm-contract.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest

from mambaverse.models import list_models
from tests.tasks.vision.timm_contract.suite import Outcome, run, unpacked_sdist

SMALL = list_models("test_*", domain="vision")
LARGE = [
    name
    for name in list_models(os.environ.get("MAMBAVERSE_TIMM_MODELS", "*"), domain="vision")
    if not fnmatch.fnmatch(name, "test_*")
]
FILES = ("test_models.py", "test_model_input.py")
OF_EVERY_MODEL = {
    *("test_model_forward", "test_model_backward", "test_model_forward_torchscript", "test_model_forward_fx"),
    *("test_model_backward_fx", "test_model_forward_fx_torchscript", "test_model_forward_intermediates"),
    *("test_model_forward_intermediates_features", "test_prune_intermediate_layers_contract"),
    *("test_model_init_weights_after_to_empty", "test_prune_intermediate_layers_params_used"),
    "test_export_tracks_reset_classifier_structure",
}
TOO_LARGE = "Fixed input size model > limit"  # timm's own words for images too large for its tests' machines
OF_TOKENS, OF_MAPS = {"test_model_default_cfgs_non_std"}, {"test_model_default_cfgs", "test_model_forward_features"}


@pytest.fixture(scope="module")
def small_outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    sdist = unpacked_sdist(request.config.cache)
    return run(sdist, "test_*", tmp_path_factory.mktemp("timm") / "report.xml", *FILES)


def check(name: str, outcomes: list[Outcome]) -> None:
    own = [o for o in outcomes if name in o.parameters.replace(".", "-").split("-")]
    failed = [f"{o.test}[{o.parameters}]: {o.reason}" for o in own if o.outcome == "failed"]
    assert not failed, "\n".join(failed)
    assert [o for o in own if o.outcome == "skipped" and TOO_LARGE not in o.reason] == []
    ran = {o.test for o in own}
    missing = (OF_EVERY_MODEL | (OF_TOKENS if ran & OF_TOKENS else OF_MAPS)) - ran
    assert not missing, f"timm has no such test for {name} any more: {missing}"


def test_every_family_has_a_small_variant() -> None:
    assert {name.split("_")[0] for name in list_models(domain="vision")} - {"test"} == {
        name.removeprefix("test_") for name in SMALL
    }


@pytest.mark.parametrize("name", SMALL)
def test_small_variants_pass_timms_tests(name: str, small_outcomes: list[Outcome]) -> None:
    check(name, small_outcomes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LARGE)
def test_every_model_passes_timms_tests(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    sdist = unpacked_sdist(request.config.cache)
    check(name, run(sdist, name, tmp_path / "report.xml", *FILES))
