"""Promises of the attributions: shares sum to the score's change, fields are gradients, Δ is that of each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mambaverse.attribution import integrated_gradients, outer_mixers, receptive_field, step_sizes_of
from mambaverse.backbones.hierarchical import Hierarchical
from mambaverse.backbones.isotropic import Isotropic


def test_shares_sum_to_what_the_score_changes_by() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 1), nn.Flatten(0))
    x, baseline = torch.randn(3, 4), torch.randn(3, 4)
    shares = integrated_gradients(model, x, baseline, steps=100)
    assert shares.shape == x.shape
    expected = (model(x[None]) - model(baseline[None])).item()
    assert shares.sum().item() == pytest.approx(expected, rel=1e-3)


def test_shares_of_a_linear_score_are_weight_times_change() -> None:
    weight, x = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.25, -1.0])
    shares = integrated_gradients(lambda inputs: inputs @ weight, x, torch.zeros(3), steps=3)
    torch.testing.assert_close(shares, weight * x)


def test_a_receptive_field_is_the_length_of_the_jacobian() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, padding=1)
    field = receptive_field(lambda x: conv(x)[:, :, 2, 3], torch.randn(1, 6, 6), probes=2000)[0]
    expected = torch.zeros(6, 6)
    expected[1:4, 2:5] = conv.weight.detach().square().sum((0, 1)).sqrt()
    assert field[expected == 0].abs().max() == 0
    torch.testing.assert_close(field, expected, rtol=0.06, atol=1e-6)


def test_a_receptive_field_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    model, x = nn.Linear(5, 3), torch.randn(5)
    state = torch.get_rng_state()
    first = receptive_field(lambda inputs: model(inputs).tanh(), x)
    assert torch.equal(first, receptive_field(lambda inputs: model(inputs).tanh(), x))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_layer_tells_its_steps_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Isotropic(16, 3, ["ssd", "attention", "vim"], {"ssd": {"d_state": 8}}, causal=False)
    tokens = torch.randn(2, 5, 16)
    layers = step_sizes_of(model, lambda: model(tokens))
    assert [layer.name for layer in layers] == [f"layers.{i}.mixer" for i in range(3)]
    assert [list(layer.sizes) for layer in layers] == [["forward", "backward"], [], ["forward", "backward"]]
    for dt in (dt for layer in layers for dt in layer.sizes.values()):
        assert dt.shape == (2, 5) and (dt > 0).all() and not dt.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())
    block = model.blocks()[0]
    expected = block.mixer.step_sizes(block.norm(tokens)[0])["forward"].mean(-1)
    torch.testing.assert_close(layers[0].sizes["forward"], expected)


def test_grids_are_told_stage_by_stage() -> None:
    model = Hierarchical([16, 32], [1, 2], ["ss2d", ["s6", "ss2d"]])
    layers = step_sizes_of(model, lambda: model(torch.randn(1, 6, 4, 16)))
    assert [layer.spatial_shape for layer in layers] == [(6, 4), (3, 2), (3, 2)]
    assert [len(layer.sizes) for layer in layers] == [4, 2, 4]


def test_a_mixer_inside_another_is_left_to_it() -> None:
    model = Isotropic(16, 1, "s6", causal=False)
    assert [name for name, _ in outer_mixers(model)] == ["layers.0.mixer"]


def test_hooks_are_gone_after_a_run_that_failed() -> None:
    model = Isotropic(16, 1, "s6", causal=True)

    def run() -> Tensor:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        step_sizes_of(model, run)
    assert not any(module._forward_pre_hooks for module in model.modules())
