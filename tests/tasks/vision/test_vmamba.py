"""VMamba as a timm model: the original's sizes, names and numbers, and the members that a newcomer touches at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mambaverse
import mambaverse.timm
from mambaverse.config import compose
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.errors import UserError
from mambaverse.tasks.vision.task import VisionTask
from mambaverse.tasks.vision.vmamba_weights import rename
from tests.tasks.vision import vmamba_reference

SMALL: dict[str, Any] = {"dims": 8, "num_classes": 5}
DEPTHS = (1, 1, 2, 1)  # of test_vmamba
MIXER_ARGS = {"ssd": {"d_state": 8, "headdim": 4}, "s6": {"d_state": 4}}
V0: dict[str, Any] = {
    "mixer_args": {"ss2d": {"d_state": 3, "expand": 2.0, "gate": "silu", "conv_bias": True}},
    "stem": "patch",
    "downsample": "merge",
    "mlp_ratio": 0.0,
}


def small(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vmamba", **{**SMALL, "mixer_args": MIXER_ARGS, **overrides}).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "millions", "num_keys"),
    [
        ("tiny_s1l8", 30.249, 276),
        ("tiny_s2l5", 30.706, 222),
        ("small_s2l15", 50.148, 402),
        ("small_s1l20", 49.013, 492),
        ("base_s2l15", 88.558, 402),
        ("base_s1l20", 86.615, 492),
        ("tiny_v0", 22.893, 212),
        ("small_v0", 44.417, 446),
        ("base_v0", 76.254, 446),
    ],
)
def test_parameter_counts_equal_the_originals(name: str, millions: float, num_keys: int) -> None:
    model = mambaverse.create_model(f"vmamba_{name}_224", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert len(model.state_dict()) == num_keys


@pytest.mark.parametrize(("name", "billions"), [("tiny_s1l8", 4.9), ("base_s1l20", 15.2)])
def test_multiply_adds_are_the_papers(name: str, billions: float) -> None:
    with FakeTensorMode():
        model = mambaverse.create_model(f"vmamba_{name}_224")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.01)


def original_shapes(
    dims: int, depths: tuple[int, ...], classes: int, N: int = 1, expand: int = 1, v0: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' training code."""
    widths = [dims * 2**i for i in range(len(depths))]
    stem = {"0": (dims, 3, 4, 4)} if v0 else {"0": (dims // 2, 3, 3, 3), "5": (dims, dims // 2, 3, 3)}
    shapes: dict[str, tuple[int, ...]] = {f"patch_embed.{i}.weight": shape for i, shape in stem.items()}
    shapes |= {f"patch_embed.{i}.bias": shape[:1] for i, shape in stem.items()}
    norms = {"patch_embed.2": dims} if v0 else {"patch_embed.2": dims // 2, "patch_embed.7": dims}
    for i, (D, depth) in enumerate(zip(widths, depths, strict=True)):
        E, R = D * expand, -(-D // 16)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            norms |= {f"{block}.norm": D, f"{block}.op.out_norm": E}
            op = {
                "in_proj.weight": (2 * E if v0 else E, D), "conv2d.weight": (E, 1, 3, 3),
                "x_proj_weight": (4, R + 2 * N, E), "dt_projs_weight": (4, E, R), "dt_projs_bias": (4, E),
                "A_logs": (4 * E, N), "Ds": (4 * E,), "out_proj.weight": (D, E),
            } | ({"conv2d.bias": (E,)} if v0 else {})  # fmt: skip
            shapes |= {f"{block}.op.{name}": shape for name, shape in op.items()}
            if not v0:
                norms[f"{block}.norm2"] = D
                mlp = {"fc1.weight": (4 * D, D), "fc1.bias": (4 * D,), "fc2.weight": (D, 4 * D), "fc2.bias": (D,)}
                shapes |= {f"{block}.mlp.{name}": shape for name, shape in mlp.items()}
        if i < len(depths) - 1:
            down = f"layers.{i}.downsample"
            norms[f"{down}.1" if v0 else f"{down}.3"] = 4 * D if v0 else 2 * D
            shapes |= (
                {f"{down}.2.weight": (2 * D, 4 * D)}
                if v0
                else {f"{down}.1.weight": (2 * D, D, 3, 3), f"{down}.1.bias": (2 * D,)}
            )
    norms["classifier.norm"] = widths[-1]
    shapes |= {"classifier.head.weight": (classes, widths[-1]), "classifier.head.bias": (classes,)}
    return shapes | {f"{name}.{kind}": (D,) for name, D in norms.items() for kind in ("weight", "bias")}


def original_weights(**sizes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, shape in original_shapes(**sizes).items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 and "A_logs" not in name else 1
        value = torch.randn(shape, generator=generator) * (0.7 if fan_in == 1 else 1.5) / fan_in**0.5
        weights[name] = value - 2 if name.endswith("dt_projs_bias") else value
    return weights


def single_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters as the authors' file without dependencies spells them."""
    spelt = {}
    for name, value in weights.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            spelt[name.removesuffix("_weight") + ".weight"] = value.flatten(0, 1)
        else:
            spelt[name] = value[..., None, None] if name.endswith((".in_proj.weight", ".fc2.weight")) else value
    return spelt


def test_original_names_and_shapes_are_those_of_the_checkpoints() -> None:
    assert len(original_shapes(96, (2, 2, 8, 2), 1000)) == 276
    shapes = original_shapes(96, (2, 2, 9, 2), 1000, N=16, expand=2, v0=True)
    assert shapes["layers.0.blocks.0.op.x_proj_weight"] == (4, 38, 192)
    for name, theirs in (("tiny_s1l8", original_shapes(96, (2, 2, 8, 2), 1000)), ("tiny_v0", shapes)):
        own = mambaverse.create_model(f"vmamba_{name}_224", device="meta").state_dict()
        renamed = rename({key: torch.empty(shape, device="meta") for key, shape in theirs.items()})
        assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in own.items()}


@pytest.mark.parametrize("spelling", [dict, single_file])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_logits_equal_the_original_architecture(spelling: Any, size: tuple[int, int]) -> None:
    weights = original_weights(dims=16, depths=DEPTHS, classes=7)
    model = small(dims=16, num_classes=7)
    model.load_state_dict(spelling(weights))
    x = images(2, 3, *size)
    expected = vmamba_reference.vmamba({k: v.double() for k, v in weights.items()}, x.double(), DEPTHS)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=1e-4)


def test_logits_equal_the_first_version() -> None:
    weights = original_weights(dims=16, depths=DEPTHS, classes=7, N=3, expand=2, v0=True)
    model = small(dims=16, num_classes=7, **V0)
    x = images(2, 3, 32, 32)
    expected = vmamba_reference.vmamba_v0({k: v.double() for k, v in weights.items()}, x.double(), DEPTHS)
    old = {
        "classifier.": "", ".op.": ".self_attention.", "patch_embed.0": "patch_embed.proj",
        "patch_embed.2": "patch_embed.norm", "downsample.1": "downsample.norm", "downsample.2": "downsample.reduction",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        new = name.replace(".norm.", ".ln_1.") if ".blocks." in name else name
        for after, before in old.items():
            new = new.replace(after, before)
        renamed[new] = value
    for spelt in (weights, renamed):
        model.load_state_dict(spelt)
        with torch.no_grad():
            torch.testing.assert_close(model(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapper", ["model", "model_ema", None])
def test_a_checkpoint_of_theirs_adapts_to_channels_and_classes(wrapper: str | None) -> None:
    weights = original_weights(dims=16, depths=DEPTHS, classes=1000)
    checkpoint = weights if wrapper is None else {wrapper: weights, "epoch": 3}
    overlay = {"state_dict": checkpoint}
    arguments = {"dims": 16, "pretrained": True, "pretrained_cfg_overlay": overlay}
    model = small(in_chans=1, **arguments)
    assert model.head.weight.shape == (5, 128)
    torch.testing.assert_close(model.norm_f.weight, weights["classifier.norm.weight"])
    torch.testing.assert_close(model.patch_embed.conv1.weight, weights["patch_embed.0.weight"].sum(1, keepdim=True))
    model = small(num_classes=1000, **arguments)
    torch.testing.assert_close(model.head.weight, weights["classifier.head.weight"])


def test_a_file_of_theirs_loads_by_its_path(tmp_path: Path) -> None:
    weights = original_weights(dims=16, depths=DEPTHS, classes=7)
    torch.save({"model": weights}, tmp_path / "theirs.pth")
    model = small(dims=16, num_classes=7, checkpoint_path=str(tmp_path / "theirs.pth"))
    torch.testing.assert_close(model.head.weight, weights["classifier.head.weight"])


def test_a_run_starts_from_a_file_of_theirs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = original_weights(dims=16, depths=DEPTHS, classes=7)
    torch.save({"model": weights, "epoch": 3}, tmp_path / "theirs.pth")
    arguments = ("task.name=vision", "data.name=digits", "model.name=test_vmamba")
    task = VisionTask(compose("vision/digits", [*arguments]))
    model = small(dims=16, in_chans=1)
    task.load_checkpoint(model, tmp_path / "theirs.pth")
    torch.testing.assert_close(model.norm_f.weight, weights["classifier.norm.weight"])
    torch.testing.assert_close(model.patch_embed.conv1.weight, weights["patch_embed.0.weight"].sum(1, keepdim=True))
    assert "its head knows 7 classes and is left out; that for 5 classes starts anew" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"weights of another model: .*of another shape"):
        task.load_checkpoint(small(dims=8, in_chans=1), tmp_path / "theirs.pth")


def test_our_own_names_survive_saving_and_the_hub(tmp_path: Path) -> None:
    model, x = small(), images(1, 3, 32, 32)
    other = timm.create_model("test_vmamba", **SMALL)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model(x))
    model = timm.create_model("test_vmamba", num_classes=3).eval()
    timm.models.save_for_hf(model, str(tmp_path))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_both_doors_build_the_same_model() -> None:
    names = mambaverse.list_models("*vmamba*", domain="vision")
    assert len(names) == 10 and set(names) <= set(timm.list_models("*vmamba*"))
    assert type(small()) is type(mambaverse.create_model("test_vmamba", **SMALL))


def test_a_variant_keeps_its_own_arguments_beside_given_ones() -> None:
    model: Any = mambaverse.create_model("vmamba_tiny_s2l5_224", mixer_args={"ss2d": {"d_state": 2}}, device="meta")
    mixer = model.layers[0].blocks[0].mixer
    assert (mixer.d_inner, mixer.d_state) == (192, 2)


@pytest.mark.parametrize(
    "mixer", ["s6", "ssd", "vim", "attention", ["ss2d", "ss2d", ["ss2d", "attention"], "attention"]]
)
def test_any_mixer_classifies_and_learns(mixer: Any) -> None:
    model = small(mixer=mixer).train()
    model(images(2, 3, 32, 32)).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


def test_pools_and_heads() -> None:
    x = images(2, 3, 32, 64)
    model = small()
    assert model(x).shape == (2, 5)
    assert model.forward_features(x).shape == (2, 1, 2, 64) and model.output_fmt == "NHWC"
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 64)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert small(num_classes=0)(x).shape == (2, 64)
    assert small(num_classes=0, global_pool="")(x).shape == (2, 1, 2, 64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and not model.head.training
    assert model.get_classifier() is model.head


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (33, 47), (5, 3)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    assert small(img_size=size)(images(1, 3, *size)).shape == (1, 5)


def test_a_model_that_left_the_meta_device_is_made_anew() -> None:
    model: Any = timm.create_model("test_vmamba", device="meta", dtype=torch.float64, drop_rate=0.1, **SMALL)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters()) and model.head_drop.p == 0.1
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    y = model(images(1, 3, 16, 16).double())
    assert y.dtype == torch.float64 and y.isfinite().all()
    torch.testing.assert_close(model.layers[0].blocks[0].mlp.fc1.weight.std().item(), 0.02, atol=0.003, rtol=0)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_small_images_take_small_patches(patch_size: int) -> None:
    model = small(patch_size=patch_size, in_chans=1)
    maps = model.forward_intermediates(images(1, 1, 16, 16), intermediates_only=True)
    assert [m.shape[2] for m in maps] == [16 // (patch_size * 2**i) or 1 for i in range(4)]
    assert [info["reduction"] for info in model.feature_info] == [patch_size * 2**i for i in range(4)]


def test_bfloat16_and_autocast() -> None:
    half = small().to(torch.bfloat16)
    y = half(images(1, 3, 32, 32).bfloat16())
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(half.float()(images(1, 3, 32, 32)).float(), y.float(), atol=0.02, rtol=0.1)


def test_intermediate_features() -> None:
    model, x = small(), images(2, 3, 32, 64)
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 16), (2, 16, 4, 8), (2, 32, 2, 4), (2, 64, 1, 2)]
    torch.testing.assert_close(final, model.forward_features(x))
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])
    last = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)[0]
    torch.testing.assert_close(last, final)
    features = small(features_only=True, out_indices=(0, 2))(x)
    for actual, expected in zip(features, (maps[0], maps[2]), strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(UserError, match="expected 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_the_features() -> None:
    model, x = small(), images(1, 3, 32, 32)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    torch.testing.assert_close(model.forward_features(x).permute(0, 3, 1, 2), expected)
    assert model.num_features == 16 and model(x).shape == (1, 4, 4, 16)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")  # timm's contract asks for it all the same
@pytest.mark.parametrize("overrides", [{}, V0], ids=["v05_noz", "v0"])
def test_scripted_model_agrees(overrides: dict[str, Any]) -> None:
    model = small(**overrides)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in ((32, 32), (40, 24)):
            x = images(1, 3, *size)
            torch.testing.assert_close(scripted(x), model(x), atol=1e-5, rtol=1e-4)


def test_compiled_model_agrees() -> None:
    model, x = small(), images(1, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_weight_decay_and_layer_groups() -> None:
    model = small()
    names = {name for name, _ in model.named_parameters()}
    block = "layers.0.blocks.0.mixer"
    assert {f"{block}.A_logs", f"{block}.Ds", f"{block}.dt_projs_bias"} <= model.no_weight_decay() <= names
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + sum(DEPTHS) + 1  # a downsampling goes with its first block, the last norm with the last
    assert len(timm.models.group_parameters(model, model.group_matcher(coarse=True))) == 1 + 4 + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stem": "patches"}, "stem: unknown stem 'patches', did you mean 'patch'"),
        ({"patch_size": 8}, "the convolutional stem knows 4, 2 and 1, got 8"),
        ({"global_pool": "max"}, "expected 'avg' or '', got 'max'"),
        ({"mixer": ["ss2d", "s6"]}, "for each of the 4 stages, got 2 entries"),
        ({"mixer": ["ss2d", "ss2d", ["ss2d", ["s6"]], "s6"]}, "as there are no stages here"),
        ({"in_chans": 0}, "in_chans: expected at least 1, got 0"),
        ({"depht": 3}, "unknown argument 'depht', did you mean 'depths'"),
        ({"mixer_args": {"ss2d": {"headdim": 8}}}, "unknown argument 'headdim'"),
        ({"pretrained": True}, "no published weights"),
    ],
)
def test_wrong_arguments(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mambaverse.create_model("test_vmamba", **overrides)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected images of shape \(B, 3, H, W\), got"):
        small()(torch.randn(shape))
