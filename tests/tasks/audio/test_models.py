"""Audio Mamba and the raw-waveform classifier: sizes, names, any mixer, any length."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mambaverse
from mambaverse.errors import UserError
from mambaverse.tasks.audio.raw import AudioRaw

MIXERS = ["vim", "s6", "ssd", "s4d", "mamba3", "bissd", "attention", ["s6", "attention"]]


def small(**arguments: Any) -> Any:
    sizes = {"bins": 16, "frames": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 3}
    model = mambaverse.create_model("aum_tiny_patch16_128x128", **(sizes | arguments))
    louder(model)
    return model.eval()


def small_raw(**arguments: Any) -> Any:
    model = mambaverse.create_model("audio_raw_nano", **({"embed_dim": 16, "depth": 2, "num_classes": 3} | arguments))
    louder(model)
    return model.eval()


def louder(model: nn.Module) -> None:
    """Make logits of the order of 1, so that a tolerance means something."""
    with torch.no_grad():
        for name in ("head.weight", "pos_embed.pos_embed", "cls_token"):
            if name in (parameters := dict(model.named_parameters())):
                parameters[name].mul_(20)


@pytest.mark.parametrize(
    ("name", "num_classes", "millions"),
    [  # the authors' table: AudioSet, VGGSound, VoxCeleb, Speech Commands, EPIC-Sounds
        *[("base", *row) for row in ((527, 92.11), (309, 91.94), (1251, 92.66), (35, 91.39), (44, 91.74))],
        *[("small", *row) for row in ((527, 25.54), (309, 25.46), (1251, 25.82), (35, 25.18), (44, 25.35))],
    ],
)
def test_parameter_counts_are_those_of_the_authors(name: str, num_classes: int, millions: float) -> None:
    frames = 128 if num_classes == 35 else 1024
    model = mambaverse.create_model(f"aum_{name}_patch16_128x{frames}", num_classes=num_classes, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("kind", "has", "lacks"),
    [
        ("Fo-Fo", ("A_log", "conv1d.weight", "D"), ("A_b_log", "conv1d_b.weight")),
        ("Fo-Bi", ("A_log", "A_b_log", "conv1d.weight"), ("conv1d_b.weight", "D_b", "x_proj_b.weight")),
        ("Bi-Bi", ("A_b_log", "conv1d_b.weight", "D_b", "x_proj_b.weight", "dt_proj_b.bias"), ()),
    ],
)
def test_direction_types_are_those_of_the_paper(kind: str, has: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    model = small(direction_type=kind)
    names = set(model.layers[0].mixer.state_dict())
    assert set(has) <= names and not set(lacks) & names
    mixer = model.layers[0].mixer
    if kind != "Fo-Fo":
        assert (mixer.merge, mixer.shared) == (("add", True) if kind == "Fo-Bi" else ("mean", False))


def test_names_are_those_of_the_authors() -> None:
    names = set(small().state_dict())
    stem = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.pos_embed", "cls_token"}
    assert stem | {"norm_f.weight", "head.weight", "head.bias", "layers.1.norm.weight"} <= names
    assert all(name.startswith("layers.") for name in names - stem - {"norm_f.weight", "head.weight", "head.bias"})


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_clip_gives_the_same_alone_and_in_a_padded_batch(mixer: Any, pool: str) -> None:
    model = small(mixer=mixer, global_pool=pool)
    x, lengths = torch.randn(5, 50, 16), torch.tensor([50, 37, 3, 1, 32])  # longer and shorter than the table's 32
    with torch.no_grad():
        together = model(x, lengths=lengths)
        for row, clip, length in zip(together, x, lengths.tolist(), strict=True):
            torch.testing.assert_close(row, model(clip[None, :length])[0], atol=1e-5, rtol=1e-4)
    assert together.abs().mean() > 0.1


def test_wide_looks_at_evenly_spaced_times_of_each_clip() -> None:
    model = small(wide=5, wide_decay=0.0)
    torch.nn.init.normal_(model.wide.weight)
    torch.nn.init.normal_(model.wide.bias)
    x, lengths = torch.randn(2, 17, 16), torch.tensor([17, 9])
    expected = [
        torch.einsum("pf,pfc->c", x[b, : size : (size - 1) // 4], model.wide.weight) + model.wide.bias
        for b, size in enumerate(lengths.tolist())
    ]
    torch.testing.assert_close(model.wide(x, lengths), torch.stack(expected), atol=1e-5, rtol=1e-4)
    alone = torch.cat([model(x[b : b + 1, :size]) for b, size in enumerate(lengths.tolist())])
    torch.testing.assert_close(model(x, lengths), alone, atol=1e-5, rtol=1e-4)
    assert model.train()(x, lengths).shape == (2, 2, 3)  # the deep scores and these, each to learn by itself
    assert small(wide=5)(x[:, :1]).isfinite().all()


@pytest.mark.parametrize("cls_position", ["first", "middle", "last", "none"])
@pytest.mark.parametrize("patch_size", [4, [16, 2], [4, 8]], ids=str)
def test_padding_changes_nothing_for_any_patch_and_cls_position(cls_position: str, patch_size: Any) -> None:
    model = small(cls_position=cls_position, patch_size=patch_size)
    x, lengths = torch.randn(3, 30, 16), torch.tensor([13, 30, 4])
    with torch.no_grad():
        together = model(x, lengths=lengths)
        torch.testing.assert_close(together[:1], model(x[:1, :13]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together, model(x, lengths=lengths.clone()), atol=0, rtol=0)
        x[0, 13:] = float("inf")  # whatever stands behind a clip
        torch.testing.assert_close(together, model(x, lengths=lengths), atol=0, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("build", [small, small_raw, lambda: small(wide=3), lambda: small(global_pool="avg")])
def test_padding_of_any_value_changes_nothing(build: Any, value: float) -> None:
    model, lengths = build(), torch.tensor([20, 7])
    x = torch.randn(2, 20, 16)
    if isinstance(model, AudioRaw):
        x, lengths = torch.randn(2, 2000), 100 * lengths
    else:
        for wide in [model.wide] if model.wide is not None else []:
            nn.init.normal_(wide.weight)
    other = x.clone()
    other[1, int(lengths[1]) :] = value
    assert torch.equal(model(other, lengths), model(x, lengths))


def test_gradients_of_a_padded_batch_are_those_of_its_clips() -> None:
    model = small()
    x, lengths = torch.randn(2, 24, 16), torch.tensor([24, 9])
    model(x, lengths=lengths).square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for clip, length in zip(x, lengths.tolist(), strict=True):
        model(clip[None, :length]).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(together[name], p.grad, atol=1e-4, rtol=1e-3)


def test_the_sequence_is_band_by_band_with_the_cls_token_in_the_middle() -> None:
    model = small(depth=1)
    model.layers[0] = PassOn()
    model.norm_f = PassOn()
    x = torch.randn(1, 32, 16)
    tokens, counts = model.forward_features(x)
    assert tokens.shape == (1, 4 * 8 + 1, 16) and counts.tolist() == [32]
    patch = model.patch_embed(x[:, 12:16, 8:12].transpose(1, 2)[:, None])[0, :, 0, 0]
    row, column = 2, 3
    place = row * 8 + column
    expected = patch + model.pos_embed.pos_embed[0, 1 + place]
    torch.testing.assert_close(tokens[0, place + 1], expected)  # behind the cls token, which is number 16
    torch.testing.assert_close(tokens[0, 16], (model.cls_token + model.pos_embed.pos_embed[:, :1])[0, 0])


class PassOn(nn.Module):
    """In place of a block and of the last norm."""

    def forward(self, x: Tensor, residual: Tensor | None = None, grid: Any = None) -> tuple[Tensor, Tensor | None]:
        return x, residual


def test_longer_clips_stretch_the_positions_and_shorter_ones_take_the_first() -> None:
    table = small().pos_embed
    assert table.places(5).shape == (1, 4, 5, 16)
    torch.testing.assert_close(table.places(5), table.places(8)[:, :, :5])
    longer = table.places(16)
    torch.testing.assert_close(longer[:, :, ::15], table.places(8)[:, :, ::7])
    torch.testing.assert_close(longer.mean(2), table.places(8).mean(2), atol=1e-5, rtol=1e-4)


def test_a_compiled_model_reads_clips_of_any_length() -> None:
    model = small(depth=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for frames in (20, 31, 32, 33, 3, 50):  # whole patches and not, fewer than one, more than there are places for
        x = torch.randn(2, frames, 16)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_waveform_gives_the_same_alone_and_in_a_padded_batch(mixer: Any) -> None:
    model = small_raw(mixer=mixer)
    x, lengths = torch.randn(4, 3000), torch.tensor([3000, 100, 1700, 466])  # 100 are fewer than the stem's reach, 465
    with torch.no_grad():
        together = model(x, lengths=lengths)
        for row, clip, length in zip(together, x, lengths.tolist(), strict=True):
            torch.testing.assert_close(row, model(clip[None, :length])[0], atol=1e-5, rtol=1e-4)


def test_a_token_of_a_waveform_is_ten_milliseconds() -> None:
    model = small_raw()
    assert isinstance(model, AudioRaw)
    assert model.stem.shortest == 465
    lengths = torch.tensor([1, 465, 624, 625, 16_000])
    assert model.stem.num_tokens(lengths).tolist() == [1, 1, 1, 2, 98]
    assert model.stem(torch.randn(1, 16_000)).shape == (1, 98, 16)


@pytest.mark.parametrize("make", [small, small_raw])
def test_every_parameter_learns(make: Any) -> None:
    model = make().train()
    shape = (2, 40, 16) if make is small else (2, 2000)
    model(torch.randn(shape), lengths=torch.tensor([shape[1], shape[1] // 2])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert set(model.group_matcher()) == {"stem", "blocks"}


def test_models_without_a_head_and_with_drop_rates() -> None:
    assert small(num_classes=0)(torch.randn(1, 8, 16)).shape == (1, 16)
    assert small_raw(num_classes=0)(torch.randn(1, 800)).shape == (1, 16)
    model = small(drop_rate=0.1, pos_drop_rate=0.2, drop_path_rate=0.3)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)


def test_a_mixer_that_needs_a_grid_gets_one() -> None:
    class Grid(mambaverse.Mixer):
        causal, needs_spatial_shape = False, True

        def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
            super().__init__()

        def mix_sequence(self, x: Any, state: Any = None, cu_seqlens: Any = None, spatial_shape: Any = None) -> Any:
            assert spatial_shape == (4, 5)
            return x, None

    mambaverse.register_mixer("grid_audio_test", overwrite=True)(Grid)
    model = small(mixer="grid_audio_test")
    assert model.cls_position == "none" and model(torch.randn(2, 20, 16)).shape == (2, 3)
    with pytest.raises(UserError, match=r"give clips of one length \(data.frames\)"):
        model(torch.randn(2, 20, 16), lengths=torch.tensor([20, 10]))
    with pytest.raises(UserError, match="a mixer here needs a grid of tokens; a waveform has none"):
        small_raw(mixer="grid_audio_test")
    with pytest.raises(UserError, match="needs the tokens to be a grid; use 'none'"):
        small(mixer="grid_audio_test", cls_position="first")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("aum_nano_patch16_128x128", {"patch_size": 12}, "12 bands do not divide bins=128; the nearest that does is 8"),
        ("aum_nano_patch16_128x128", {"patch_size": [4, 4, 4]}, r"expected one number, or \[bands, frames\]"),
        ("aum_nano_patch16_128x128", {"frames": 0}, "frames: expected at least 1, got 0"),
        ("aum_nano_patch16_128x128", {"cls_position": "centre"}, "expected 'middle', 'first', 'last' or 'none'"),
        ("aum_nano_patch16_128x128", {"global_pool": "max"}, "expected 'token' or 'avg', got 'max'"),
        ("aum_nano_patch16_128x128", {"global_pool": "token", "cls_position": "none"}, "needs a cls token"),
        ("aum_nano_patch16_128x128", {"direction_type": "Fo_Bi"}, "unknown 'Fo_Bi', did you mean 'Fo-Bi'"),
        ("aum_nano_patch16_128x128", {"direction_type": "Fo-Bi", "mixer": "ssd"}, "leave out mixer='ssd', or it"),
        ("aum_nano_patch16_128x128", {"mixer": "s7"}, "did you mean 's6'"),
        ("aum_nano_patch16_128x128", {"wide": -1}, "wide: expected at least 0, got -1"),
        (
            "aum_nano_patch16_128x128",
            {"wide": 2, "wide_decay": -0.1},
            "wide_decay: expected a finite number of at least",
        ),
        ("aum_nano_patch16_128x128", {"bins": 0}, "bins: expected at least 1, got 0"),
        ("aum_nano_patch16_128x128", {"depht": 2}, "unknown argument 'depht', did you mean 'depth'"),
        ("aum_nano_patch16_128x128", {"pretrained": True}, "no published weights in our format"),
        ("audio_raw_nano", {"pretrained": True}, "there are no published weights yet"),
        ("audio_raw_nano", {"stem": [[4, 5]]}, r"stem: expected \[width, stride\] pairs"),
        ("audio_raw_nano", {"stem": [10, 5]}, r"width >= stride >= 1, got \[10, 5\]"),
        ("audio_raw_nano", {"stem": [[10.5, 5]]}, r"width >= stride >= 1, got \[\[10.5, 5\]\]"),
    ],
)
def test_wrong_arguments_are_one_line(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mambaverse.create_model(name, **overrides)


@pytest.mark.parametrize("shape", [(1, 20, 8), (20, 16), (1, 0, 16)])
def test_spectrograms_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected spectrograms of shape \(B, T, 16\), got"):
        small()(torch.randn(shape))
    with pytest.raises(UserError, match=r"expected waveforms of shape \(B, L\), got"):
        small_raw()(torch.randn(1, 2, 3))
    with pytest.raises(UserError, match=r"expected waveforms of shape \(B, L\), got \(2, 0\)"):
        small_raw()(torch.randn(2, 0))


def test_models_run_in_half_precision() -> None:
    model = small().to(torch.bfloat16)
    out = model(torch.randn(2, 20, 16, dtype=torch.bfloat16), lengths=torch.tensor([20, 9]))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("lengths", [[8, 4], torch.tensor([8.0, 4.0])], ids=["list", "floats"])
def test_lengths_that_are_no_whole_numbers_are_named(lengths: Any) -> None:
    for model, x in ((small(), torch.randn(2, 8, 16)), (small_raw(), torch.randn(2, 8))):
        with pytest.raises(ValueError, match=r"lengths: expected a tensor \(2,\) of whole numbers"):
            model(x, lengths)


@pytest.mark.parametrize("lengths", [[8], [8, 9], [8, 0], [8, -1]], ids=str)
def test_lengths_of_other_clips_are_named(lengths: list[int]) -> None:
    for model, x in ((small(), torch.randn(2, 8, 16)), (small_raw(), torch.randn(2, 8))):
        with pytest.raises(ValueError, match=r"lengths: expected (shape \(2,\)|values from 1 to L = 8)"):
            model(x, torch.tensor(lengths))


@pytest.mark.parametrize("given", ["tolist", "numpy", "int", "double", "bool"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_are_no_floats_like_the_weights_is_named(given: str, autocast: bool) -> None:
    for model, x, what in (
        (small(), torch.ones(2, 8, 16), r"spectrograms .*16\)"),
        (small_raw(), torch.ones(2, 8), r"wav.*L\)"),
    ):
        message = f"expected {what}, as (a tensor|floats like the weights), got"
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(UserError, match=message):
            model(getattr(x, given)())


def test_floats_of_the_weights_or_under_autocast_shorter_ones_are_read() -> None:
    for model, x in ((small(), torch.randn(2, 8, 16)), (small_raw(), torch.randn(2, 2000))):
        with torch.autocast("cpu", torch.bfloat16):
            assert all(model(x.to(dtype)).isfinite().all() for dtype in (torch.float32, torch.float16, torch.bfloat16))
        assert model.double()(x.double()).dtype == torch.float64
