"""Weights files for audio models: those of Audio Mamba's and Vision Mamba's authors, and our own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mambaverse
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.tasks.audio.checkpoints import load_aum
from tests.tasks.audio.test_models import small, small_raw


def test_the_authors_checkpoints_load(tmp_path: Path) -> None:
    model, other = small(), small()
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "aum.pth")
    load_aum(other, tmp_path / "aum.pth")
    x = torch.randn(1, 32, 16)
    torch.testing.assert_close(other(x), model(x))


def test_a_checkpoint_for_longer_clips_and_other_classes_is_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = small(frames=64), small(num_classes=5)
    torch.save(model.state_dict(), tmp_path / "aum.pth")
    load_aum(other, tmp_path / "aum.pth")
    assert "its head knows 3 classes and is left out; that for 5 classes starts anew" in capsys.readouterr().err
    ours, theirs = other.pos_embed.pos_embed, model.pos_embed.pos_embed
    torch.testing.assert_close(ours[:, 0], theirs[:, 0])
    pairs = theirs[:, 1:].unflatten(1, (4, 8, 2)).mean(3)
    torch.testing.assert_close(ours[:, 1:].unflatten(1, (4, 8)), pairs)


def test_a_vision_mamba_checkpoint_is_turned_into_one(tmp_path: Path) -> None:
    vim = mambaverse.create_model("vim_nano_patch4_32", embed_dim=16, depth=2, num_classes=3)  # 8 x 8 patches
    weights = vim.state_dict()
    cls_first = weights["pos_embed"]
    middle = torch.cat([cls_first[:, 1:33], cls_first[:, :1], cls_first[:, 33:]], 1)  # in the order of the sequence
    torch.save({"model": weights | {"pos_embed": middle}}, tmp_path / "vim.pth")
    model = small()
    load_aum(model, tmp_path / "vim.pth")
    pos_embed, proj = model.pos_embed.pos_embed, model.patch_embed.proj
    torch.testing.assert_close(pos_embed[:, 0], cls_first[:, 0])
    pairs = cls_first[:, 1:].unflatten(1, (4, 2, 8)).mean(2)  # 8 rows of patches become 4
    torch.testing.assert_close(pos_embed[:, 1:].unflatten(1, (4, 8)), pairs)
    torch.testing.assert_close(proj.weight, weights["patch_embed.proj.weight"].mean(1, keepdim=True))
    torch.save({"model": weights}, tmp_path / "wrapped.pth")
    torch.save(weights, tmp_path / "ours.pth")
    save_file(weights, tmp_path / "ours.safetensors")
    for name in ("wrapped.pth", "ours.pth", "ours.safetensors"):  # ours have the cls token first
        load_aum(again := small(), tmp_path / name)
        assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(small(embed_dim=24).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="weights of another model"):
        load_aum(small(), tmp_path / "other.pth")
    odd = small().state_dict() | {"pos_embed.pos_embed": torch.zeros(1, 1 + 30, 16)}
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="a position embedding of 30 places, no multiple of 4 bands of patches"):
        load_aum(small(), tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="weights of another model"):
        load_aum(small_raw(), tmp_path / "odd.pth")


def test_a_compiled_model_for_longer_clips_is_fitted(tmp_path: Path) -> None:
    longer = small(frames=64).state_dict()
    torch.save({f"_orig_mod.{name}": value for name, value in longer.items()}, tmp_path / "aum.pth")
    load_aum(model := small(), tmp_path / "aum.pth")
    assert model.head.weight.equal(longer["head.weight"])


def test_linear_scores_of_other_classes_start_anew_with_the_head(tmp_path: Path) -> None:
    torch.save(small(wide=3).state_dict(), tmp_path / "aum.pth")
    load_aum(model := small(wide=3, num_classes=5), tmp_path / "aum.pth")
    assert not model.wide.weight.any() and model.wide.weight.shape == (3, 16, 5)


@pytest.mark.parametrize("shape", [(7,), (1, 1, 16), (1, 0, 16), (2, 65, 16)])
@pytest.mark.parametrize("name", ["pos_embed", "pos_embed.pos_embed"])
def test_what_is_no_position_embedding_is_named(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4), name: torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"weights of another model: pos_embed \(.*\), expected \(1, 1 cls"):
        load_aum(small(), tmp_path / "x.pth")


def test_positions_without_filters_of_patches_are_left_to_be_named(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.zeros(1, 65, 16)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"weights of another model: .* 1 unexpected \(pos_embed\)"):
        load_aum(small(), tmp_path / "x.pth")


@pytest.mark.parametrize("build", [small, small_raw])
def test_a_head_for_as_many_other_classes_starts_anew(
    build: Any, make_task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, path = build(num_classes=2), tmp_path / "best.pt"
    torch.save(old.state_dict(), path)
    (tmp_path / "facts.json").write_text('{"classes": ["cat", "dog"]}')
    task = make_task("audio/mandarin_tones", setup=False)
    for classes, kept in ((["cat", "dog"], True), (["cup", "jug"], False)):
        task.classes, new = classes, build(num_classes=2)
        task.load_checkpoint(new, path)
        assert torch.equal(new.norm_f.weight, old.norm_f.weight)
        assert torch.equal(new.head.weight, old.head.weight) == kept
        assert ("its head knows other classes (cat, dog, ...), not (cup, jug, ...)" in capsys.readouterr().err) != kept
