"""What is drawn of an image model: Δ where its tokens lie, for every family, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import mambaverse
from mambaverse.attribution import LayerSteps
from mambaverse.mixers import create_mixer
from mambaverse.tasks.vision.explain import (
    DeltaMap,
    Explanation,
    explain_image,
    layer_title,
    place_tokens,
    share_covering,
)
from mambaverse.tasks.vision.explain_figure import LAYERS, delta_panels, explain_sheet
from mambaverse.tasks.vision.task import VisionTask

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_classes": 3}


def look(model: nn.Module, size: int | tuple[int, int] = 32, channels: int = 3) -> Explanation:
    torch.manual_seed(0)
    sides = (size, size) if isinstance(size, int) else size
    return explain_image(model.eval(), model, torch.randn(channels, *sides), 1)


def drawn(explanation: Explanation, path: Path, side: int = 32) -> tuple[int, int]:
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    explain_sheet(
        path, "photos/a_$b$.jpg", image, torch.tensor([0.2, 0.7, 0.1]), ["ant", "$b_{ee}$", "$\\nothing$"], explanation
    )
    with Image.open(path) as picture:
        return picture.size


@pytest.mark.parametrize("position", ["middle", "first", "last", "none"])
def test_tokens_are_laid_on_the_grid_wherever_the_cls_token_stands(position: str) -> None:
    model: Any = mambaverse.create_model("vim_nano_patch4_32", img_size=(8, 12), cls_position=position, **SMALL)
    assert model.patch_embed.grid_size == (2, 3)
    length, at = (6, None) if position == "none" else (7, model._cls_index(6))
    tokens = [float(i) for i in range(1, 7)]
    if at is not None:
        tokens.insert(at, 21.0)
    told = LayerSteps("layers.0.mixer", create_mixer("s6", 16), None, {"forward": torch.tensor([tokens])})
    assert len(tokens) == length
    placed = place_tokens(model, told)
    assert placed is not None and placed.maps["forward"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert placed.cls == (None if at is None else pytest.approx(6.0))


@pytest.mark.parametrize(
    ("mixer", "scans"),
    [
        ("vim", ["forward", "backward"]),
        ("ssd", ["forward", "backward"]),
        ("bissd", ["forward", "backward"]),
        ("mamba3", ["forward", "backward"]),
        ("ss2d", ["by rows", "by columns", "by rows, backwards", "by columns, backwards"]),
    ],
)
def test_vim_of_any_mixer_with_a_step(mixer: str, scans: list[str], tmp_path: Path) -> None:
    arguments = {} if mixer in ("vim", "ss2d") else {mixer: {"d_state": 8}}
    found = look(mambaverse.create_model("vim_nano_patch4_32", mixer=mixer, mixer_args=arguments, **SMALL))
    assert [delta.layer for delta in found.deltas] == ["layer 1", "layer 2"] and not found.note
    for delta in found.deltas:
        assert list(delta.maps) == scans and {tuple(m.shape) for m in delta.maps.values()} == {(8, 8)}
    assert found.shares.shape == (32, 32) and found.reach is not None and 0 < found.covered <= 1
    assert found.middle == (17.5, 17.5)  # the middle of token (4, 4), whose pixels are 16 to 19
    drawn(found, tmp_path / "x.png")


@pytest.mark.parametrize("mixer", ["attention", "s4d", "retnet"])
def test_mixers_without_a_step_are_named_in_its_place(mixer: str, tmp_path: Path) -> None:
    found = look(mambaverse.create_model("vim_nano_patch4_32", mixer=mixer, **SMALL))
    assert not found.deltas and mixer in found.note.lower() and "no Δ" in found.note
    both = look(mambaverse.create_model("vim_nano_patch4_32", mixer=["vim", mixer], **SMALL))
    assert len(both.deltas) == 1 and mixer in both.without[0].lower() and not both.note
    assert drawn(found, tmp_path / "a.png")[1] < drawn(both, tmp_path / "b.png")[1]


def test_stages_of_a_pyramid_have_grids_of_their_own(tmp_path: Path) -> None:
    model = mambaverse.create_model("test_vmamba", mixer=["ss2d", "s6", ["ss2d", "attention"], "attention"])
    found = look(model, (64, 96))
    assert [delta.layer for delta in found.deltas] == ["stage 1, block 1", "stage 2, block 1", "stage 3, block 1"]
    grids = [{tuple(m.shape) for m in delta.maps.values()} for delta in found.deltas]
    assert grids == [{(16, 24)}, {(8, 12)}, {(4, 6)}] and found.without == ["Attention"]
    names = [title.split(":")[0] for title, _ in delta_panels(found.deltas)]
    assert names[:3] == ["by rows, all layers", "by columns, all layers", "by rows, backwards, all layers"]
    assert "forward, all layers" in names and names[-1] == "stage 3, block 1"


def test_convolutions_in_front_of_the_mixers_change_nothing(tmp_path: Path) -> None:
    found = look(mambaverse.create_model("strata_nano_patch4_32", num_classes=3))
    assert len(found.deltas) > 1 and found.without == ["Attention"] and found.reach is not None
    assert {tuple(m.shape) for delta in found.deltas for m in delta.maps.values()} == {(8, 8)}
    drawn(found, tmp_path / "x.png")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_models_of_timm_have_all_but_a_step(name: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    found = look(timm.create_model(name, num_classes=3, **arguments))
    assert not found.deltas and "no mixer of mambaverse" in found.note
    assert found.reach is not None and found.reach.max() > 0 and found.shares.abs().max() > 0
    drawn(found, tmp_path / "x.png")


def test_a_model_without_a_feature_map_says_so(tmp_path: Path) -> None:
    found = look(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)))
    assert found.reach is None
    drawn(found, tmp_path / "x.png")


def test_a_field_reaches_no_farther_than_the_model_reads() -> None:
    class Convolutions(nn.Module):
        """Token (4, 4) of 8 x 8 reads the pixels 4 · 4 - 3 to 4 · 4 + 3 of 32 x 32."""

        output_fmt = "NHWC"

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(2)))

        def forward_features(self, x: Tensor) -> Tensor:
            return self.body(x).permute(0, 2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_features(x).mean((1, 2))

    reach = look(Convolutions()).reach
    assert reach is not None and (reach[13:20, 13:20] > 0).all()
    reach[13:20, 13:20] = 0
    assert not reach.any()


def test_many_layers_are_thinned_out_evenly() -> None:
    deltas = [DeltaMap(f"layer {i + 1}", {"forward": torch.rand(2, 2) + 1}) for i in range(24)]
    titles = [title.split(":")[0] for title, _ in delta_panels(deltas)]
    assert titles[:2] == ["forward, all layers", "layer 1"] and titles[-1] == "layer 24" and len(titles) == LAYERS + 1
    assert delta_panels([]) == []


def test_a_panel_shows_multiples_of_its_layers_mean() -> None:
    maps = {"forward": torch.tensor([[1.0, 3.0]]), "backward": torch.tensor([[3.0, 5.0]])}
    (_, forward), (_, backward), (title, both) = delta_panels([DeltaMap("layer 1", maps, 1.5)])
    assert forward.tolist() == [[0.5, 1.5]] and backward.tolist() == [[0.75, 1.25]]
    assert title == "layer 1: Δ 3, cls 1.5x" and both[0].tolist() == pytest.approx([2 / 3, 4 / 3])


def test_how_much_of_an_image_holds_a_field() -> None:
    assert share_covering(torch.tensor([[96.0, 2.0], [1.0, 1.0]]), 0.95) == 0.25
    assert share_covering(torch.ones(10, 10), 0.95) == pytest.approx(0.95, abs=0.011)


def test_layers_are_named_for_people() -> None:
    assert layer_title("layers.3.mixer") == "layer 4"
    assert layer_title("layers.0.blocks.1.mixer") == "stage 1, block 2"
    assert layer_title("body.mixer") == "body.mixer"


def test_an_ensemble_is_explained_as_one_and_looked_into_by_its_first(
    make_task: Callable[..., VisionTask], tmp_path: Path
) -> None:
    task = make_task("vision/digits", "model.members=2", "model.args.depth=1")
    model = task.build_model().eval()
    task.explain(tmp_path / "x.png", model, "seven", {"image": torch.zeros(1, 8, 8, dtype=torch.uint8)})
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000
