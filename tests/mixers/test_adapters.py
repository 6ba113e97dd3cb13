"""A layer that takes another's place, as peft's adapters do, has an effect in every mixer, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from mambaverse import create_model
from mambaverse.mixers import create_mixer, list_mixers
from mambaverse.mixers.base import Mixer


class OwnForward(nn.Linear):
    """Like loralib's layers: a subclass, with parameters and a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LowRank(nn.Module):
    """Like peft's layers: no subclass of what it wraps, whose weight it shows."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Parameter(torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def run(mixer: Mixer, x: Tensor) -> Tensor:
    y: Tensor = mixer(x=x, spatial_shape=(2, 3) if mixer.needs_spatial_shape else None)
    return y


@pytest.mark.parametrize("name", sorted(list_mixers()))
def test_every_linear_layer_takes_an_adapter_or_refuses_it(name: str) -> None:
    torch.manual_seed(0)
    x, adapted = torch.randn(2, 6, 32), 0
    mixer = create_mixer(name, 32)
    plain = run(mixer, x)
    owners = [(owner, child, layer) for owner in mixer.modules() for child, layer in owner.named_children()]
    for owner, child, layer in owners:
        if not isinstance(layer, nn.Linear):
            continue
        wrapped = LowRank(layer)
        if isinstance(owner, Mixer) and child in owner.uncalled:
            with pytest.raises(TypeError, match=rf"{child} cannot become a LowRank.* called: in_proj, .*out_proj"):
                setattr(owner, child, wrapped)
            continue
        setattr(owner, child, wrapped)
        y = run(mixer, x)
        torch.testing.assert_close(y, plain)  # a new adapter adds nothing
        (gradient,) = torch.autograd.grad(y.square().sum(), wrapped.up)
        assert gradient.abs().max() > 0, f"{name}: {child} is not called"
        adapted += 1
    assert adapted


def test_a_subclass_with_its_own_forward_is_refused_and_a_parametrized_layer_is_not() -> None:
    mixer: Any = create_mixer("s6", 32)
    with pytest.raises(TypeError, match="dt_proj cannot become a OwnForward"):
        mixer.dt_proj = OwnForward(2, 64)
    plain, x = copy.deepcopy(mixer.conv1d), torch.randn(2, 6, 32)
    y = mixer(x=x)
    nn.utils.parametrizations.weight_norm(mixer.conv1d)
    torch.testing.assert_close(mixer(x=x), y)
    mixer.conv1d = plain  # whose class that of the parametrized one is derived from


@pytest.mark.parametrize("name", sorted(list_mixers()))
def test_layers_whose_parameters_are_read_alone_are_refused_in_place_of(name: str) -> None:
    mixer = create_mixer(name, 32)
    for child in mixer.uncalled:
        layer = getattr(mixer, child, None)
        if layer is None:
            continue
        with pytest.raises(TypeError, match=f"reads those of this {type(layer).__name__} without calling it"):
            setattr(mixer, child, nn.Sequential(layer, nn.Linear(1, 1)))
        assert getattr(mixer, child) is layer
        for allowed in (copy.deepcopy(layer), nn.Sequential(layer), None):  # of the same kind, with its parameters
            setattr(mixer, child, allowed)
            assert getattr(mixer, child) is allowed
            setattr(mixer, child, layer)


def test_the_scores_of_a_language_model_take_an_adapter() -> None:
    model: Any = create_model("dna_mamba_d64_n2", dim=16, depth=1, head="causal_lm", tie_embeddings=False)
    model.lm_head = LowRank(model.lm_head)
    (gradient,) = torch.autograd.grad(model(torch.randint(4, (1, 9))).square().sum(), model.lm_head.up)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["s6", "ssd", "vim"])
def test_a_hook_that_works_out_a_weight_nobody_calls_for_is_refused(name: str) -> None:
    x = torch.randn(2, 6, 32)
    for part in ("weight", "bias"):
        mixer: Any = create_mixer(name, 32)
        prune.l1_unstructured(mixer.conv1d, part, amount=0.5)
        with pytest.raises(TypeError, match=rf"a hook works out conv1d\.{part}, .* and never runs"):
            run(mixer, x)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=r"a hook works out|cannot be run step by step"):
        mixer.step(x[:, 0], mixer.init_state(2) if mixer.supports_state else None)
    mixer = create_mixer(name, 32)
    parametrizations.weight_norm(mixer.conv1d)
    mixer.conv1d.register_forward_pre_hook(lambda *_: None)  # of no parameter
    before = run(mixer, x)
    with torch.no_grad():
        mixer.conv1d.parametrizations.weight.original0.mul_(3)
    assert not torch.allclose(run(mixer, x), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of such layers
def test_a_quantized_layer_that_is_not_called_is_refused() -> None:
    mixer = create_mixer("s6", 32)
    quantized = torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear})
    with pytest.raises(TypeError, match="dt_proj has become a Linear, whose weight is no tensor"):
        run(quantized, torch.randn(2, 6, 32))
