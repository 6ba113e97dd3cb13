"""A run starts from the weights of another, of other classes or channels too, and says what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mambaverse
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.tasks.vision.task import VisionTask

NAMES = ["vim_nano_patch4_32", "test_vmamba", "strata_nano_patch4_32"]


def build(name: str, classes: int, in_chans: int = 3) -> nn.Module:
    size: dict[str, Any] = (
        {"depth": 1} if name.startswith("vim") else {"depths": [1] * (1 if name.startswith("strata") else 4)}
    )
    return mambaverse.create_model(name, num_classes=classes, in_chans=in_chans, **size)


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_other_classes_starts_anew_and_the_rest_is_taken_over(
    name: str, make_task: Callable[..., VisionTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    old, new = build(name, 5), build(name, 3)
    save_file(old.state_dict(), path := tmp_path / "old.safetensors")
    head = new.state_dict()["head.weight"].clone()
    make_task("vision/digits", setup=False).load_checkpoint(new, path)
    assert "its head knows 5 classes and is left out; that for 3 classes starts anew" in capsys.readouterr().err
    kept, taken = new.state_dict(), old.state_dict()
    assert kept["head.weight"].equal(head)
    assert all(kept[key].equal(taken[key]) for key in kept if not key.startswith("head."))


@pytest.mark.parametrize("name", NAMES[:2])
def test_grey_images_see_the_sum_of_the_colours_filters(
    name: str, make_task: Callable[..., VisionTask], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    old, new = build(name, 3).eval(), build(name, 3, in_chans=1).eval()
    save_file(old.state_dict(), path := tmp_path / "old.safetensors")
    make_task("vision/digits", setup=False).load_checkpoint(new, path)
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(new(grey), old(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[:2])
def test_weights_for_grey_images_see_colours_as_one(
    name: str, make_task: Callable[..., VisionTask], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    old, new = build(name, 3, in_chans=1).eval(), build(name, 3).eval()
    save_file(old.state_dict(), path := tmp_path / "old.safetensors")
    make_task("vision/digits", setup=False).load_checkpoint(new, path)
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(new(grey.expand(-1, 3, -1, -1)), old(grey), rtol=1e-4, atol=1e-5)


def test_a_head_for_as_many_other_classes_starts_anew_too(
    make_task: Callable[..., VisionTask], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = build("test_vmamba", 2), build("test_vmamba", 2)
    save_file(old.state_dict(), path := tmp_path / "best.safetensors")
    (tmp_path / "facts.json").write_text('{"classes": ["cat", "dog"]}')
    task = make_task("vision/digits", setup=False)
    for classes, kept in ((["cat", "dog"], True), (["cup", "jug"], False)):
        task.classes = classes
        task.load_checkpoint(new, path)
        assert new.state_dict()["head.weight"].equal(old.state_dict()["head.weight"]) == kept
        assert ("its head knows other classes (cat, dog, ...)" in capsys.readouterr().err) != kept


@pytest.mark.parametrize("name", ["test_strata", "test_vmamba"])
def test_pyramids_take_a_file_of_weights(name: str, tmp_path: Path) -> None:
    old = mambaverse.create_model(name, num_classes=5)
    save_file(old.state_dict(), path := tmp_path / "old.safetensors")
    new = mambaverse.create_model(name, num_classes=5, checkpoint_path=str(path)).state_dict()
    assert all(new[key].equal(value) for key, value in old.state_dict().items())
    mambaverse.create_model(name, features_only=True, num_classes=0, checkpoint_path=path)


def test_weights_of_another_model_are_still_refused(make_task: Callable[..., VisionTask], tmp_path: Path) -> None:
    save_file(build("test_vmamba", 3).state_dict(), path := tmp_path / "old.safetensors")
    with pytest.raises(CheckpointError, match="weights of another model"):
        make_task("vision/digits", setup=False).load_checkpoint(build("vim_nano_patch4_32", 3), path)
