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

SIZES: dict[str, dict[str, Any]] = {
    "vim_nano_patch4_32": {"depth": 1},
    "test_vmamba": {"depths": [1] * 4},
    "strata_nano_patch4_32": {"depths": [1]},
}
NAMES = [*SIZES]


def build(name: str, classes: int, in_chans: int = 3) -> nn.Module:
    return mambaverse.create_model(name, num_classes=classes, in_chans=in_chans, **SIZES[name])


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "headless", [{"num_classes": 0}, {"features_only": True}, {"features_only": True, "out_indices": (0,)}]
)
def test_a_backbone_takes_the_weights_of_a_classifier(
    name: str, headless: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {"depth": 2} if "depth" in SIZES[name] else SIZES[name]
    old: Any = mambaverse.create_model(name, num_classes=3, **sizes).eval()
    save_file(old.state_dict(), path := tmp_path / "old.safetensors")
    new = mambaverse.create_model(name, **sizes, **headless, checkpoint_path=path).eval()
    x = torch.randn(1, *old.pretrained_cfg["input_size"])
    if "features_only" in headless:
        given, expected = new(x)[0], old.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    else:
        given, expected = new(x), old.forward_head(old.forward_features(x), pre_logits=True)
    assert given.equal(expected)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_of_a_distributed_or_compiled_model_is_taken_off(
    name: str, prefix: str, make_task: Callable[..., VisionTask], tmp_path: Path
) -> None:
    old, new = build(name, 3), build(name, 3)
    save_file({prefix + key: value for key, value in old.state_dict().items()}, path := tmp_path / "old.safetensors")
    make_task("vision/digits", setup=False).load_checkpoint(new, path)
    third = mambaverse.create_model(name, **SIZES[name], num_classes=3, checkpoint_path=path)
    for model in (new, third):
        assert all(value.equal(old.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_model_or_of_other_axes_are_named(name: str, other: str, tmp_path: Path) -> None:
    weights = build(other, 3).state_dict()
    if other == name:
        weights = {key: value[None] for key, value in weights.items()}
    save_file(weights, path := tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: weights of another model: "):
        mambaverse.create_model(name, **SIZES[name], num_classes=3, checkpoint_path=path)


STEM = "patch_embed.conv1.weight"


@pytest.mark.parametrize(
    ("key", "shape"),
    [("head.weight", ()), *((STEM, shape) for shape in ((), (8,), (8, 27), (8, 0, 3, 3), (8, 4, 3, 3, 3)))],
)
def test_a_stem_or_head_of_other_axes_is_named(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = build("test_vmamba", 3).state_dict()
    save_file(weights | {key: torch.zeros(shape)}, path := tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"weights of another model: 1 of another shape.*{key}"):
        mambaverse.create_model("test_vmamba", **SIZES["test_vmamba"], num_classes=3, checkpoint_path=path)


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
