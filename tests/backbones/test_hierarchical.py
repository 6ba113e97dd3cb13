"""The hierarchical backbone: any mixer in any stage, grids of any size, nothing that only one family needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambaverse.backbones.hierarchical import Hierarchical, stage_patterns
from mambaverse.errors import UserError
from mambaverse.mixers import list_mixers
from mambaverse.mixers.bidirectional import Bidirectional

MIXER_ARGS: dict[str, Any] = {"ssd": {"d_state": 8, "headdim": 4}, "s6": {"d_state": 4}}


def small(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return Hierarchical(**{"dims": [8, 16, 24], "depths": [1, 2, 1], "mixer_args": MIXER_ARGS} | overrides).eval()


@pytest.mark.parametrize("mixer", list_mixers())
def test_any_mixer_runs_and_learns_and_is_made_anew(mixer: str) -> None:
    model = small(mixer=mixer)
    model(torch.randn(2, 6, 4, 8)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []
    empty = small(mixer=mixer, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    empty.init_weights()
    assert [name for name, p in empty.named_parameters() if not p.isfinite().all()] == []
    assert empty.no_weight_decay() <= {name for name, _ in empty.named_parameters()}


def test_a_stage_has_a_mixer_or_a_pattern_of_its_own() -> None:
    model = small(mixer=["ss2d", ["s6", "attention"], "attention"], mixer_args={"attention": {"headdim": 4}})
    names = [[type(block.mixer).__name__ for block in stage.blocks] for stage in model.stages()]
    assert names == [["SS2D"], ["Bidirectional", "Attention"], ["Attention"]]
    assert not any(block.mixer.causal for stage in model.stages() for block in stage.blocks)
    assert model(torch.randn(2, 5, 7, 8)).shape == (2, 2, 2, 24)


def test_a_causal_mixer_reads_both_ways_unless_told_otherwise() -> None:
    assert isinstance(small(mixer="s6").layers[0].blocks[0].mixer, Bidirectional)
    assert small(mixer="s6", directions=1).layers[0].blocks[0].mixer.causal


@pytest.mark.parametrize("downsample", ["conv", "merge"])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 1), (9, 2)])
def test_every_stage_halves_the_grid_rounding_up(downsample: str, grid: tuple[int, int]) -> None:
    model = small(downsample=downsample, mlp_ratio=0.0, norm="rms")
    half = [-(-side // 2) for side in grid]
    assert model(torch.randn(2, *grid, 8)).shape == (2, *(-(-side // 2) for side in half), 24)


def test_merging_fills_an_odd_grid_with_zeros() -> None:
    merge = small(downsample="merge").layers[1].downsample
    x = torch.randn(1, 3, 5, 8)
    filled = torch.zeros(1, 4, 6, 8)
    filled[:, :3, :5] = x
    torch.testing.assert_close(merge(x), merge(filled))


def test_rates_of_drop_path_grow_over_all_stages() -> None:
    blocks = [block for stage in small(drop_path_rate=0.3).stages() for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_checkpointing_agrees() -> None:
    model, x = small(layer_scale=0.1), torch.randn(1, 4, 4, 8)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")  # timm's contract asks for it all the same
def test_scripted_hybrid_agrees() -> None:
    model, x = small(mixer=["ss2d", ["ss2d", "s6"], "attention"]), torch.randn(2, 5, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dims": [8, 16]}, r"dims and depths: expected as many of both, .* got \[8, 16\] and \[1, 2, 1\]"),
        ({"depths": [1, 0, 1]}, "at least 1 each"),
        ({"downsample": "pool"}, "downsample: expected 'conv' or 'merge', got 'pool'"),
        ({"norm": "batch"}, "norm: expected 'rms' or 'layer', got 'batch'"),
        ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
        ({"mixer": ["ss2d", "s6"]}, "for each of the 3 stages, got 2 entries"),
        ({"mixer": ["ss2d", [], "s6"]}, "got an empty list"),
        ({"mixer": "ss2"}, "did you mean 'ss2d'"),
        ({"mixer_args": {"ss2d": {"gates": "silu"}}}, "unknown argument 'gates'.*did you mean 'gate'"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**overrides)


def test_patterns_repeat_inside_their_stage() -> None:
    assert stage_patterns("s6", [1, 2]) == [["s6"], ["s6", "s6"]]
    assert stage_patterns([["s6", "ssd"], "s4d"], [3, 1]) == [["s6", "ssd", "s6"], ["s4d"]]
