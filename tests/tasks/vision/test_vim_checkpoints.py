"""Weights files for Vim: the original's layout and ours, other sizes, channels, classes; the original's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models._hub import save_for_hf
from torch import Tensor

import mambaverse
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.errors import UserError
from mambaverse.tasks.vision.task import VisionTask
from mambaverse.tasks.vision.vim_checkpoints import checkpoint_filter_fn

SIZES: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_classes": 6, "mixer_args": {"vim": {"d_state": 4}}}


def build(seed: int = 1, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return mambaverse.create_model("test_vim", **{**SIZES, **overrides}).eval()


def as_original(model: Any) -> dict[str, Tensor]:
    """Return the weights of `model` as hustvl/Vim stores them: the position of the cls token where it is read."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    table = weights["pos_embed"]
    at = model._cls_index(table.shape[1] - 1)
    weights["pos_embed"] = torch.cat([table[:, 1 : at + 1], table[:, :1], table[:, at + 1 :]], 1)
    return weights


@pytest.fixture
def original(tmp_path: Path) -> tuple[Any, Path]:
    """Return a model and a training checkpoint of it in the original's form; its "model_ema" holds halves."""
    model = build(seed=0)
    weights = as_original(model)
    halves = {name: value / 2 for name, value in weights.items()}
    content = {"model": weights, "model_ema": halves, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "vim.pth")
    return model, tmp_path / "vim.pth"


def vim_of_the_paper(weights: dict[str, Tensor], x: Tensor, patch: int) -> Tensor:
    """Logits of Vim in plain PyTorch and float64, from the original's state dict: Zhu et al. 2024, algorithm 1."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(t: Tensor, weight: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def direction(u: Tensor, layer: str, b: str) -> Tensor:
        """The state-space model of one direction on u (B, L, E), read from its start, without its gate."""
        A_log = w[f"{layer}A{b}_log"]
        filters = w[f"{layer}conv1d{b}.weight"]
        rank, state = w[f"{layer}dt_proj{b}.weight"].shape[1], A_log.shape[1]
        padded = F.pad(u.transpose(1, 2), (filters.shape[2] - 1, 0))
        v = F.silu(F.conv1d(padded, filters, w[f"{layer}conv1d{b}.bias"], groups=u.shape[2])).transpose(1, 2)
        d, B, C = (v @ w[f"{layer}x_proj{b}.weight"].T).split([rank, state, state], -1)
        step = F.softplus(d @ w[f"{layer}dt_proj{b}.weight"].T + w[f"{layer}dt_proj{b}.bias"])
        h, ys = v.new_zeros(*v.shape[::2], state), []
        for t in range(v.shape[1]):
            decay = torch.exp(step[:, t, :, None] * -torch.exp(A_log))
            h = decay * h + (step[:, t] * v[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1) + w[f"{layer}D{b}"] * v[:, t])
        return torch.stack(ys, 1)

    tokens = F.conv2d(x.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2)
    middle = tokens.shape[1] // 2
    cls = w["cls_token"].expand(len(x), -1, -1)
    tokens = torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], 1) + w["pos_embed"]
    for i in range(sum(name.endswith("norm.weight") for name in w)):
        layer = f"layers.{i}.mixer."
        u, z = (norm(tokens, w[f"layers.{i}.norm.weight"]) @ w[f"{layer}in_proj.weight"].T).chunk(2, -1)
        y = direction(u, layer, "") + direction(u.flip(1), layer, "_b").flip(1)
        tokens = tokens + (y / 2 * F.silu(z)) @ w[f"{layer}out_proj.weight"].T
    return norm(tokens, w["norm_f.weight"])[:, middle] @ w["head.weight"].T + w["head.bias"]


def test_forward_is_that_of_the_paper_on_the_originals_weights(original: tuple[Any, Path]) -> None:
    _, path = original
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(path, weights_only=True)["model"]
    x = torch.randn(2, 3, 64, 64)
    expected = vim_of_the_paper(weights, x, patch=16)
    assert expected.std() > 1e-3
    y = build(checkpoint_path=path)(x)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", [None, "model", "model_ema"])
def test_an_original_checkpoint_loads_by_its_keys(original: tuple[Any, Path], key: str | None) -> None:
    model, path = original
    loaded = build(checkpoint_path=path, checkpoint_key=key).state_dict()
    factor = 0.5 if key == "model_ema" else 1
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], factor * value), name


@pytest.mark.parametrize("position", ["first", "last", "none"])
def test_the_cls_token_is_found_where_it_was_read(position: str, tmp_path: Path) -> None:
    model = build(seed=0, cls_position=position)
    weights = model.state_dict() if position == "none" else as_original(model)
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "w.pth")
    loaded = build(cls_position=position, checkpoint_path=tmp_path / "w.pth")
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_our_own_files_load_as_they_are(tmp_path: Path) -> None:
    model = build(seed=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth.tar")
    for name in ("w.safetensors", "w.pth.tar"):
        assert torch.equal(build(checkpoint_path=tmp_path / name).pos_embed, model.pos_embed)


@pytest.mark.parametrize("wrap", [lambda m: m, torch.nn.parallel.DataParallel, torch.compile])
def test_our_own_files_load_as_they_are_under_the_originals_keys(wrap: Any, tmp_path: Path) -> None:
    model = build(seed=0)
    path = tmp_path / "w.pth"
    torch.save({"model": wrap(model).state_dict(), "epoch": 3}, path)
    for key in (None, "model"):
        assert torch.equal(build(checkpoint_path=path, checkpoint_key=key).pos_embed, model.pos_embed)
    loaded: Any = timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **SIZES)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "changes",
    [{"img_size": 96}, {"img_size": (32, 96)}, {"stride": 8}, {"patch_size": 8}, {"in_chans": 1}, {"num_classes": 3}],
    ids=str,
)
def test_other_sizes_channels_and_classes_are_fitted(
    changes: dict, original: tuple[Any, Path], capsys: pytest.CaptureFixture
) -> None:
    model, path = original
    loaded = build(checkpoint_path=path, **changes)
    expected = resample_abs_pos_embed(model.pos_embed, list(loaded.patch_embed.grid_size), [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(loaded.pos_embed, expected)
    assert torch.equal(loaded.layers[1].mixer.A_b_log, model.layers[1].mixer.A_b_log)
    filters = loaded.patch_embed.proj.weight
    if "in_chans" in changes:
        torch.testing.assert_close(filters, model.patch_embed.proj.weight.sum(1, keepdim=True))
    elif "patch_size" not in changes:
        assert torch.equal(filters, model.patch_embed.proj.weight)
    assert torch.equal(loaded.head.weight, model.head.weight) == ("num_classes" not in changes)
    assert ("its head knows 6 classes" in capsys.readouterr().err) == ("num_classes" in changes)


def test_a_run_starts_from_an_original_checkpoint(original: tuple[Any, Path]) -> None:
    model, path = original
    started, task = build(), VisionTask.__new__(VisionTask)
    task.load_checkpoint(started, path)
    assert torch.equal(started.pos_embed, model.pos_embed)


def test_timm_loads_both_layouts(original: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = original
    make: Any = timm.create_model
    x = torch.randn(1, 3, 64, 64)
    by_file = make("test_vim", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **SIZES).eval()
    torch.testing.assert_close(by_file(x), model(x))
    overlay = {"state_dict": {"model": as_original(model)}, "num_classes": 6}
    by_dict = make("test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **{**SIZES, "num_classes": 2})
    assert torch.equal(by_dict.pos_embed, model.pos_embed) and by_dict.head.weight.shape == (2, 16)
    wide = build(seed=0, img_size=(32, 64), in_chans=2)
    save_for_hf(wide, str(tmp_path / "hub"))
    restored = make(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = torch.randn(1, 2, 32, 64)
    assert torch.equal(restored(x), wide(x))
    larger = make(f"local-dir:{tmp_path / 'hub'}", pretrained=True, img_size=(64, 64))
    expected = resample_abs_pos_embed(wide.pos_embed, [4, 4], [2, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed, expected)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"model": {}}, None, "holds no weights"),
        ({"epoch": 3}, None, "holds no weights"),
        ([1], None, "expected a dictionary of weights, got list"),
        ({"model_ema": {"pos_embed": torch.zeros(1)}}, "model", "no weights under 'model', did you mean 'model_ema'"),
        ({"model": {"pos_embed": torch.zeros(1, 8, 16)}}, None, "7 places beside 1 cls tokens"),
        (
            {"model": {"pos_embed": torch.zeros(1, 1, 17, 16)}},
            None,
            r"another model: pos_embed \(1, 1, 17, 16\), expected",
        ),
        ({"model": {"pos_embed": torch.zeros(17, 16)}}, None, r"another model: pos_embed \(17, 16\), expected \(1, "),
        ({"model": {"pos_embed": torch.zeros(1, 1, 16)}}, None, r"another model: pos_embed \(1, 1, 16\), expected"),
        ({"model": {"head.weight": torch.zeros(6, 16)}}, None, "weights of another model"),
    ],
)
def test_what_holds_no_vim_is_refused(content: Any, key: str | None, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        build(checkpoint_path=tmp_path / "w.pth", checkpoint_key=key)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights file"):
        build(checkpoint_path=tmp_path / "w.pth")


def test_the_filter_leaves_what_it_was_given() -> None:
    model = build()
    weights = as_original(model)
    before = {name: value.clone() for name, value in weights.items()}
    checkpoint_filter_fn({"model": weights}, model)
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_a_part_of_no_file_is_refused() -> None:
    with pytest.raises(UserError, match="checkpoint_key='model' names a part of a file; expected checkpoint_path"):
        build(checkpoint_key="model")
