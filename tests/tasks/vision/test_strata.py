"""Strata: sizes, the scales of its stem as features, any mixer in a stage, local convolutions."""

from typing import Any

import pytest
import torch

from mambaverse.errors import UserError
from mambaverse.models import create_model, list_models
from mambaverse.tasks.vision.pyramid import Pyramid
from mambaverse.tasks.vision.stems import ResidualStem

PARAMETERS = {"strata_nano_patch4_32": 6.554, "strata_tiny_patch4_224": 21.618, "strata_small_patch4_224": 37.663}


@pytest.mark.parametrize(("name", "millions"), PARAMETERS.items())
def test_sizes(name: str, millions: float) -> None:
    model = create_model(name, num_classes=10 if name.endswith("_32") else 1000, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_each_has_a_size_tested_here() -> None:
    assert {*list_models("strata*")} == {*PARAMETERS}


def test_the_stems_scales_are_features() -> None:
    model = create_model("test_strata", num_classes=0).eval()
    assert isinstance(model, Pyramid) and isinstance(model.patch_embed, ResidualStem)
    assert [(f["num_chs"], f["reduction"]) for f in model.feature_info] == [(8, 1), (16, 2), (32, 4), (64, 8)]
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 48), (16, 16, 24), (32, 8, 12), (64, 4, 6)]
        assert final.equal(model.forward_features(x))
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert early[0].equal(maps[1])
        model.prune_intermediate_layers([1])
        assert model.forward_features(x).permute(0, 3, 1, 2).equal(maps[1])
    assert model.num_features == 16


def test_any_mixer_in_a_stage_and_none_of_another() -> None:
    model: Any = create_model("test_strata", num_classes=3, mixer=["s6", ["ss2d", "attention"]])
    kinds = [type(block.mixer).__name__ for stage in model.stages() for block in stage.blocks]
    assert kinds == ["Bidirectional", "SS2D", "Attention"]
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_local_convolutions_see_neighbours_in_both_directions_of_the_grid() -> None:
    model: Any = create_model("test_strata", num_classes=0).eval()
    stage = model.stages()[0]
    with torch.no_grad():
        stage.blocks[0].mixer.out_proj.weight.zero_()  # what is left knows its neighbours by the convolution alone
        stage.blocks[0].mlp.fc2.weight.zero_()
        x = torch.randn(1, 6, 6, 32)
        moved = x.clone()
        moved[0, 2, 3] += 1
        seen = (stage(x) != stage(moved)).any(-1)[0].nonzero()
    assert seen.amin(0).tolist() == [1, 2] and seen.amax(0).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": 2}, "local: expected an odd side of a convolution, or 0 for none, got 2"),
        ({"stem": "residual2", "patch_size": 2}, "this stem halves its grid 2 times and knows 4 and 8, got 2"),
        ({"stem": "resid"}, "stem: unknown stem 'resid', did you mean 'residual'"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("test_strata", **options)
