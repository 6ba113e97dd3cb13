"""What a model looks at, whatever its domain: shares of a score, receptive fields, and the Δ of its mixers.

    integrated gradients    s[i] = (x[i] - x'[i]) mean_k ∂F/∂x[i] at x' + (k - 1/2)/K (x - x'),  Σ_i s[i] ≈ F(x) - F(x')
    receptive field         r[i] = (Σ_c (∂y[c]/∂x[i])²)^1/2,     y the features of one place, c their channels
    step sizes              Δ[t] of each mixer that has one: how strongly token t is written into the state

Sources: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks" (arXiv 1703.01365), section 5; Luo et al.
2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (arXiv 1701.04128), section 3;
Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3.5.2, on what Δ means.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambaverse.mixers import Mixer

STEPS = 32  # K: points at which the integral's gradient is taken
PROBES = 8  # random signs of the channels, over which the square of a receptive field is averaged
AT_ONCE = 8  # inputs of one pass


def integrated_gradients(score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int = STEPS) -> Tensor:
    """Return what each number of `x` adds to the score, in x's shape; the sum is about score(x) - score(baseline).

    Args:
        score: Takes inputs (B, ...) and returns a number for each, (B,).
        x: One input (...).
        baseline: What stands for "nothing there", broadcast to x.
        steps: K.
    """
    total = torch.zeros_like(x)
    for at in ((torch.arange(steps, device=x.device) + 0.5) / steps).split(AT_ONCE):
        between = baseline + at.view(-1, *[1] * x.ndim) * (x - baseline)
        total += _gradient(score, between).sum(0)
    return (x - baseline) * total / steps


def receptive_field(features: Callable[[Tensor], Tensor], x: Tensor, probes: int = PROBES) -> Tensor:
    """Return the length of the gradient of `features` at each number of `x`, in x's shape.

    The gradients of all channels would be as many backward passes; for random signs s[c], the mean of
    (∂ Σ_c s[c] y[c])² is Σ_c (∂y[c])². The signs are drawn with a fixed seed.

    Args:
        features: Takes inputs (B, ...) and returns the features of one place of each, (B, C).
        x: One input (...).
        probes: How many draws of signs.
    """
    generator, square = torch.Generator().manual_seed(0), torch.zeros_like(x)
    for count in [AT_ONCE] * (probes // AT_ONCE) + [probes % AT_ONCE] * (probes % AT_ONCE > 0):

        def probed(inputs: Tensor) -> Tensor:
            y = features(inputs)
            signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
            return (signs * y).sum(1)

        square += _gradient(probed, x.expand(count, *x.shape)).square().sum(0)
    return (square / probes).sqrt()


@dataclass
class LayerSteps:
    """What one mixer of a model told of its Δ in a forward pass.

    Attributes:
        name: Of the module: "layers.0.mixer".
        mixer: The mixer.
        spatial_shape: (H, W) of its tokens, if it was told.
        sizes: Mean Δ over the channels, (B, L) by the name of the scan; empty if the mixer has no Δ that depends on
            the token.
    """

    name: str
    mixer: Mixer
    spatial_shape: tuple[int, int] | None
    sizes: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def step_sizes_of(model: nn.Module, run: Callable[[], Any]) -> list[LayerSteps]:
    """Return what every mixer of `model` tells of its Δ while `run()` runs the model, in the order of the calls.

    A mixer inside a mixer (as in `bidirectional`) is left to the outer one.
    """
    found: list[LayerSteps] = []

    def listen(name: str, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        assert isinstance(module, Mixer)
        x, grid = (named if "x" in named else {"x": inputs[0]})["x"], named.get("spatial_shape")
        sizes = module.step_sizes(x, grid)
        found.append(LayerSteps(name, module, grid, {scan: dt.mean(-1).float() for scan, dt in sizes.items()}))

    with ExitStack() as hooks:
        for name, mixer in outer_mixers(model):
            handle = mixer.register_forward_pre_hook(partial(listen, name), with_kwargs=True)
            hooks.callback(handle.remove)
        run()
    return found


def outer_mixers(model: nn.Module) -> list[tuple[str, Mixer]]:
    """Return the mixers of a model by module name, without those inside of others."""
    every = [(name, module) for name, module in model.named_modules() if isinstance(module, Mixer)]
    inner = {id(part) for _, mixer in every for part in mixer.modules() if part is not mixer}
    return [(name, mixer) for name, mixer in every if id(mixer) not in inner]


def _gradient(score: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        inputs = inputs.detach().clone().requires_grad_()
        return torch.autograd.grad(score(inputs).sum(), inputs)[0]
