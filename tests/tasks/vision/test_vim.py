"""Vim as a timm model: the original's size and names, and the members that a newcomer touches at once."""

from typing import Any

import pytest
import timm
import torch

import mambaverse
import mambaverse.timm
from mambaverse.errors import UserError

SMALL: dict[str, Any] = {"img_size": 16, "depth": 3, "embed_dim": 16, "num_classes": 5}
MIXER_ARGS = {"vim": {"d_state": 4}, "ssd": {"d_state": 8, "headdim": 8}, "s6": {"d_state": 4}}


def small(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vim_nano_patch4_32", **{**SMALL, "mixer_args": MIXER_ARGS, **overrides}).eval()


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7.148), ("small", 25.797), ("base", 97.598)])
def test_parameter_counts_equal_the_originals(size: str, millions: float) -> None:
    model = mambaverse.create_model(f"vim_{size}_patch16_224", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_state_dict_names_and_shapes_are_the_originals() -> None:
    shapes = {
        k: tuple(v.shape)
        for k, v in mambaverse.create_model("vim_tiny_patch16_224", device="meta").state_dict().items()
    }
    assert len(shapes) == 415
    layer = {k.removeprefix("layers.7."): v for k, v in shapes.items() if k.startswith("layers.7.")}
    both = {
        "A_log": (384, 16), "D": (384,), "conv1d.weight": (384, 1, 4), "conv1d.bias": (384,),
        "x_proj.weight": (44, 384), "dt_proj.weight": (384, 12), "dt_proj.bias": (384,),
    }  # fmt: skip
    backward = {
        k.replace(k.split(".")[0], {"A_log": "A_b_log"}.get(k, k.split(".")[0] + "_b")): v for k, v in both.items()
    }
    mixer = both | backward | {"in_proj.weight": (768, 192), "out_proj.weight": (192, 384)}
    assert layer == {"norm.weight": (192,)} | {f"mixer.{k}": v for k, v in mixer.items()}
    rest = {k: v for k, v in shapes.items() if not k.startswith("layers.")}
    assert rest == {
        "cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "norm_f.weight": (192,), "head.weight": (1000, 192),
        "head.bias": (1000,), "patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,),
    }  # fmt: skip


def test_both_doors_build_the_same_model() -> None:
    names = mambaverse.list_models("vim*", domain="vision")
    assert len(names) == 9 and set(names) <= set(timm.list_models("vim*"))
    assert type(small()) is type(mambaverse.create_model("vim_nano_patch4_32", **SMALL))


@pytest.mark.parametrize("mixer", [*mambaverse.list_mixers(), ["vim", "attention"]])
def test_any_mixer_classifies_and_learns(mixer: str | list[str]) -> None:
    model = small(mixer=mixer).train()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


@pytest.mark.parametrize("position", ["middle", "first", "last", "none"])
def test_tokens_come_back_cls_first(position: str) -> None:
    model = small(cls_position=position)
    tokens = model.forward_features(torch.randn(2, 3, 16, 16))
    assert tokens.shape == (2, 16 + (position != "none"), 16)
    x = torch.randn(1, 3, 16, 16)
    moved = x.clone()
    moved[..., -4:, -4:] += 1  # the last patch: through the mixers everything changes, in the stem only its own token
    embed = model._cls_first(model._embed(moved)[0] - model._embed(x)[0])
    changed = embed.abs().sum(-1)[0].nonzero().flatten().tolist()
    assert changed == [15 + (position != "none")]


def test_pools_and_heads() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = small()
    assert model(x).shape == (2, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 16)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert small(global_pool="avg")(x).shape == (2, 5)
    assert small(num_classes=0)(x).shape == (2, 16)
    assert small(num_classes=0, global_pool="")(x).shape == (2, 17, 16)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and not model.head.training
    assert model.get_classifier() is model.head


def test_in_chans_img_size_and_dtype() -> None:
    assert small(in_chans=1)(torch.randn(1, 1, 16, 16)).shape == (1, 5)
    assert small(img_size=(8, 24))(torch.randn(1, 3, 8, 24)).shape == (1, 5)
    assert small(dynamic_img_size=True)(torch.randn(1, 3, 32, 20)).shape == (1, 5)
    model = small()
    model.set_input_size(img_size=24)
    assert model(torch.randn(1, 3, 24, 24)).shape == (1, 5)
    half = small().to(torch.bfloat16)
    assert half(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_intermediate_features() -> None:
    model, x = small(), torch.randn(2, 3, 16, 16)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 3 and len(model.feature_info) == 3
    torch.testing.assert_close(final, model.forward_features(x))
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])
    pairs = model.forward_intermediates(
        x, indices=1, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert pairs[0][0].shape == (2, 16, 16) and pairs[0][1].shape == (2, 1, 16)
    torch.testing.assert_close(pairs[0][0], final[:, 1:])
    features = small(features_only=True)(x)
    assert [tuple(f.shape) for f in features] == [(2, 16, 4, 4)] * 3


def test_pruning_keeps_the_features() -> None:
    model, x = small(), torch.randn(1, 3, 16, 16)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    torch.testing.assert_close(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


def test_drop_rates_reach_their_places() -> None:
    model = small(drop_rate=0.1, pos_drop_rate=0.2, drop_path_rate=0.3)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    assert model.layers[-1].drop_path.drop_prob == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")  # timm's contract asks for it all the same
@pytest.mark.parametrize(("mixer", "arguments"), [("vim", {}), ("ncssd", {"conv": "grid"}), ("ss2d", {"d_conv": 1})])
def test_scripted_model_agrees(mixer: str, arguments: dict[str, Any]) -> None:
    model, x = small(mixer=mixer, mixer_args={mixer: arguments}), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-4)


def test_compiled_model_agrees() -> None:
    model, x = small(), torch.randn(1, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_checkpointing_agrees() -> None:
    model, x = small(), torch.randn(1, 3, 16, 16)
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)


def test_weight_decay_and_layer_groups() -> None:
    model = small()
    names = {name for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "layers.0.mixer.A_b_log"} <= model.no_weight_decay() <= names
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) > 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": 0}, "patch_size: expected at least 1, got 0"),
        ({"img_size": 30}, "30 is no multiple of patch_size 4; the nearest is 32"),
        ({"img_size": 2}, "2 is no multiple of patch_size 4; the nearest is 4"),
        ({"img_size": (32,)}, r"img_size: expected a number of pixels from 1, or height and width, got \(32,\)"),
        ({"cls_position": "centre"}, "expected 'middle'"),
        ({"global_pool": "max"}, "expected 'token', 'avg' or ''"),
        ({"global_pool": "token", "cls_position": "none"}, "needs a cls token"),
        ({"in_chans": 0}, "in_chans: expected at least 1, got 0"),
        ({"depth": -1}, "depth: expected at least 0, got -1"),
        ({"depht": 3}, "unknown argument 'depht', did you mean 'depth'"),
        ({"mixer": "s7"}, "did you mean 's6'"),
        ({"mixer_args": {"vim": {"headdim": 8}}}, "unknown argument 'headdim'"),
        ({"pretrained": True}, "no published weights"),
    ],
)
def test_wrong_arguments(overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mambaverse.create_model("vim_nano_patch4_32", **overrides)


def test_what_a_given_cfg_leaves_out_is_the_models_own() -> None:
    model: Any = mambaverse.create_model("vim_nano_patch4_32", depth=1, pretrained_cfg={"num_classes": 5})
    assert model.patch_embed.img_size == (32, 32) and model.num_classes == 5
    assert model.pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    model = mambaverse.create_model("vim_nano_patch4_32", depth=1, pretrained_cfg={"input_size": (3, 16, 16)})
    assert model.patch_embed.img_size == (16, 16)


def test_unknown_model_says_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'vim_tiny_patch16_224'"):
        mambaverse.create_model("vim_tinny_patch16_224")


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 3, 32, 32), (3, 16, 16)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected images of shape \(B, 3, 16, 16\), got"):
        small()(torch.randn(shape))
