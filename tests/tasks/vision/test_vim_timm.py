"""Vim in what timm's users do beyond timm's own tests: strides, resizes, meta device, layer decay, exports."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import mambaverse
import mambaverse.timm
from mambaverse.errors import UserError


def build(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vim", **{"num_classes": 5, **overrides}).eval()


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7.250), ("small", 26.001)])
def test_stride_8_has_the_originals_parameters(size: str, millions: float) -> None:
    model: Any = mambaverse.create_model(f"vim_{size}_patch16_stride8_224", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert model.pos_embed.shape[1] == 729 + 1 and model.feature_info[0]["reduction"] == 8


def test_patches_overlap_where_the_stride_is_smaller() -> None:
    model, x = build(stride=8, img_size=(32, 48)), torch.randn(1, 3, 32, 48)
    assert model.patch_embed.grid_size == (3, 5)
    assert model.forward_features(x).shape == (1, 16, 32)
    assert [tuple(f.shape) for f in build(stride=8, features_only=True)(torch.randn(1, 3, 64, 64))] == [
        (1, 32, 7, 7)
    ] * 3
    moved = x.clone()
    moved[..., :8, 8:16] += 1  # rows 0 to 7 and columns 8 to 15 are in the patches (0, 0) and (0, 1)
    changed = (model.patch_embed(moved) - model.patch_embed(x)).abs().sum((0, 1)).nonzero().tolist()
    assert changed == [[0, 0], [0, 1]]


@pytest.mark.parametrize("stride", [None, 8])
def test_any_size_that_the_patches_cover(stride: int | None) -> None:
    model = build(stride=stride, dynamic_img_size=True)
    assert model(torch.randn(1, 3, 48, 96)).shape == (1, 5)
    maps = model.forward_intermediates(torch.randn(1, 3, 48, 96), intermediates_only=True)
    assert maps[0].shape[2:] == model.patch_embed.dynamic_feat_size((48, 96))
    with pytest.raises(UserError, match=r"images of shape \(1, 3, 52, 64\): 52 is no.*; the nearest is (48|56)"):
        model(torch.randn(1, 3, 52, 64))


def test_resizing_keeps_overlap_and_is_remembered() -> None:
    model = build(stride=8)
    model.set_input_size(img_size=(32, 64), patch_size=8)
    assert model.patch_embed.stride == (8, 8) and model.patch_embed.grid_size == (4, 8)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 5)
    side_by_side = build()
    side_by_side.set_input_size(patch_size=8)
    assert side_by_side.patch_embed.stride == (8, 8) and side_by_side.feature_info[0]["reduction"] == 8
    with pytest.raises(UserError, match="expected one number, or twice the same"):
        model.set_input_size(patch_size=(8, 16))
    with pytest.raises(UserError, match="60 is not covered by patches of 16 every 8 pixels; the nearest is 64"):
        build(stride=8).set_input_size(img_size=60)
    with pytest.raises(UserError, match="stride: expected 1 to patch_size = 16 pixels, got 20"):
        build(stride=20)


def test_weights_drawn_after_the_meta_device_are_those_of_a_new_model() -> None:
    options: dict[str, Any] = {"layer_scale": 0.1, "mlp_ratio": 2.0, "norm": "layer", "embed_dim": 64}
    expected, model = build(**options), build(device="meta", **options).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    for (name, new), old in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert new.isfinite().all(), name
        torch.testing.assert_close(new.std(), old.std(), atol=0.01, rtol=0.25, equal_nan=True, msg=name)


def test_layers_decay_towards_the_stem() -> None:
    model = build()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    order = [groups[name] for name in ("pos_embed", "layers.0.mixer.D", "layers.2.norm.weight", "head.weight")]
    assert order == sorted(set(order)) and groups["cls_token"] == groups["patch_embed.proj.weight"] == 0
    scaled = param_groups_layer_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in scaled for p in group["params"]}
    assert scale[id(model.pos_embed)] < scale[id(model.layers[0].mixer.D)] < scale[id(model.head.weight)] == 1
    decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    rates = {id(p): group["weight_decay"] for group in decayed for p in group["params"]}
    free = [model.layers[0].mixer.A_log, model.layers[2].mixer.A_b_log, model.cls_token, model.pos_embed]
    assert {rates[id(p)] for p in free} == {0.0} and rates[id(model.layers[0].mixer.in_proj.weight)] == 0.1


@pytest.mark.parametrize("size", [0, -8, 2.5, "8", (8,), (8, 0), True], ids=str)
def test_sides_that_are_no_pixels_are_refused(size: Any) -> None:
    model = build()
    for argument in ("patch_size", "img_size"):
        with pytest.raises(
            UserError, match=rf"{argument}: expected a number of pixels from 1, or height and width, got"
        ):
            model.set_input_size(**{argument: size})
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_a_pruned_model_classifies_anew() -> None:
    model, x = build(), torch.randn(2, 3, 64, 64)
    tap = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    model.prune_intermediate_layers([0], prune_norm=True)
    torch.testing.assert_close(model.forward_features(x)[:, 1:], tap)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3) and len(model.layers) == 1


def test_an_exported_program_takes_any_batch() -> None:
    model, x = build(depth=1), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))


# In a process of its own: the exporter of torch 2.14 warns of itself, and these tests make errors of warnings.
ONNX = """
import torch, timm, mambaverse.timm, onnxruntime
from collections import Counter
import sys
model = timm.create_model(sys.argv[1], num_classes=5).eval()
with torch.no_grad():
    program = torch.onnx.export(model, (torch.randn(2, 3, 64, 64),), dynamo=True, verbose=False,
                                dynamic_shapes=({0: torch.export.Dim("batch")},))
graph = program.model_proto.graph
session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
x = torch.randn(3, 3, 64, 64)
(y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
print("RESULT", {n.domain for n in graph.node}, Counter(n.op_type for n in graph.node)["Scan"],
      len(program.model_proto.functions), (torch.from_numpy(y) - model(x)).abs().max().item() < 1e-5)
"""


@pytest.mark.parametrize(
    ("name", "scans"),  # a direction of a block each; a block of VMamba has four
    [
        ("test_vim", 6),
        pytest.param("test_vmamba", 20, marks=pytest.mark.slow),
        pytest.param("test_strata", 4, marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_gives_our_numbers(name: str, scans: int) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = subprocess.run([sys.executable, "-c", ONNX, name], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert line == f"RESULT {{''}} {scans} 0 True"


@pytest.mark.parametrize("indices", [0, -1, 9, [], [9], [-9], [0, 0.5], "0", 1.5])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "strata_nano_patch4_32"])
def test_features_that_a_model_has_not_are_refused(name: str, indices: Any) -> None:
    model: Any = mambaverse.create_model(name)
    count, x = len(model.feature_info), torch.zeros(1, *model.pretrained_cfg["input_size"])
    rule = f"expected the last 1 to {count}, or a list of places from -{count} to {count - 1}, got {indices!r}"
    with pytest.raises(UserError, match=re.escape(f"indices: {rule}")):
        model.forward_intermediates(x, indices=indices)
    with pytest.raises(UserError, match=re.escape(f"indices: {rule}")):
        model.prune_intermediate_layers(indices)
    with pytest.raises(UserError, match=re.escape(f"out_indices: {rule}")):
        mambaverse.create_model(name, features_only=True, out_indices=indices)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_of_few_blocks_gives_the_features_of_all(depth: int) -> None:
    features = mambaverse.create_model("test_vim", depth=depth, features_only=True)
    assert len(features(torch.zeros(1, 3, 64, 64))) == depth
