"""The recurrence of mamba3 as a call of ssd: every dtype, steps far apart, long sequences, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.ssd import ssd
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers._trapezoid import (
    last,
    shifted,
    summed_angles,
    trapezoid_scan,
    trapezoid_step,
    trapezoid_weights,
)

BATCH, LENGTH, HEADS, STATE, CHANNELS = 2, 150, 3, 16, 8
WIDE = ("dt", "a", "trap", "h")  # fp32 in a mixer, whatever its inputs are


def draw(rank: int, spread: float, trap: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return inputs with ln Δ and a spread this far, and λ about sigmoid(trap)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (BATCH, LENGTH)
    inputs = {
        "q": normal(*tokens, rank, HEADS, STATE) + 1,
        "k": normal(*tokens, rank, HEADS, STATE) + 1,
        "v": normal(*tokens, rank, HEADS, CHANNELS),
        "dt": normal(*tokens, HEADS) * spread - 3,
        "a": normal(*tokens, HEADS) * spread,
        "trap": normal(*tokens, HEADS) + trap,
        "h": normal(BATCH, HEADS, CHANNELS, STATE),
    }
    return {name: value.to(torch.float32 if name in WIDE else dtype) for name, value in inputs.items()}


def steps(dt: Tensor, a: Tensor, trap: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Δ, -Δ A, γ[t] + β[t+1] and γ[t]."""
    return trapezoid_weights(dt, a, trap, dt.new_zeros(HEADS), "heavy_tail", 1e-4, None)


def scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, trap: Tensor, h: Tensor) -> Tensor:
    return trapezoid_scan(q, k, v, *steps(dt, a, trap), None, None, h, None, None, None, None)[0]


def recurrence(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, a: Tensor, trap: Tensor, h: Tensor) -> Tensor:
    dt, trap = F.softplus(dt), torch.sigmoid(trap)
    rate = dt * torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=1e-4)
    beta, gamma = (1 - trap) * dt, trap * dt
    outputs = []
    entered = torch.zeros_like(h)  # the sum of v kᵀ of the token before
    for t in range(q.shape[1]):
        alpha = torch.exp(-rate[:, t])[..., None, None]
        h = alpha * h + alpha * beta[:, t, :, None, None] * entered
        entered = torch.einsum("brhp,brhn->bhpn", v[:, t], k[:, t])
        h = h + gamma[:, t, :, None, None] * entered
        outputs.append(torch.einsum("bhpn,brhn->brhp", h, q[:, t]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    ("spread", "trap"),
    [(1, 0), (1, -6), (1, 6), (8, -3)],
    ids=["usual", "the token before alone", "the token itself alone", "steps from 0 to 30"],
)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scan_is_the_recurrence(dtype: torch.dtype, rank: int, spread: float, trap: float) -> None:
    inputs = draw(rank, spread, trap, dtype)
    weight = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results: list[dict[str, Any]] = []
    for function, to in ((scan, None), (recurrence, torch.float64)):
        leaves = {name: value.detach().clone().to(to or value.dtype).requires_grad_() for name, value in inputs.items()}
        y = function(**leaves)
        (y * weight).sum().backward()
        results.append({"y": y.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()})
    for name, expected in results[1].items():
        assert_close(name, results[0][name], expected, dtype)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_step_of_no_size_leaves_the_state_alone(rank: int) -> None:
    """Δ underflows to 0 in fp32: nothing decays, nothing enters, and no gradient is lost to 0 / 0."""
    inputs = draw(rank, 1, 0, torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], -200)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = scan(**leaves)
    assert_close("y", y, torch.einsum("bhpn,blrhn->blrhp", inputs["h"], inputs["q"]))
    y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


def test_without_the_token_before_it_is_the_rule_of_mamba_2() -> None:
    inputs = draw(1, 1, 0, torch.float64)
    q, k, v = (inputs[name].double() for name in "qkv")
    dt, A = F.softplus(inputs["dt"].double()), -torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    y, _ = trapezoid_scan(q, k, v, dt, -dt * A, dt, dt, *[None] * 7)
    assert_close("y", y.squeeze(2), ssd(v.squeeze(2), dt, A, k.squeeze(2), q.squeeze(2)))


@pytest.mark.parametrize("rank", [1, 3])
def test_steps_are_the_scan(rank: int) -> None:
    inputs = draw(rank, 1, 0, torch.float32)
    expected = scan(**inputs)
    h, q, k, v = (inputs[name] for name in "hqkv")
    dt, rate, _, gamma = steps(inputs["dt"], inputs["a"], inputs["trap"])
    k_before, v_before = shifted(k, None, None), shifted(v, None, None)
    per_token = (q, k, v, k_before, v_before, dt, rate, gamma)
    y = torch.stack([trapezoid_step(h, *(part[:, t] for part in per_token)) for t in range(LENGTH)], 1)
    assert_close("y", y, expected.double())


def test_angles_stay_exact_over_a_long_sequence() -> None:
    """A sum in fp32 would be off by 1e-3 radians here."""
    rate = torch.rand(1, 20_000, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    dt, before = torch.ones(1, 20_000, 1), torch.tensor([[[1.0, 2.0]]])
    radians = rate[:, :, None].double() * math.pi
    exact = radians.cumsum(1) + before[:, None].double()
    bounds = torch.tensor([0, 7, 20_000], dtype=torch.int32)
    packed = summed_angles(dt, rate, before.expand(2, -1, -1), bounds)
    restarted = radians[:, 7:].cumsum(1) + before[:, None].double()
    for angles, truth in ((summed_angles(dt, rate, before, None), exact), (packed[:, 7:], restarted)):
        assert (angles >= 0).all() and (angles <= 2 * math.pi).all()
        assert ((angles.double() - truth + math.pi) % (2 * math.pi) - math.pi).abs().max() < 1e-6


def test_what_came_before_knows_where_packed_sequences_begin() -> None:
    x = torch.arange(1.0, 6.0)[None, :, None]
    first = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    bounds = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)  # the second and the last are empty
    assert shifted(x, None, bounds).flatten().tolist() == [0, 1, 0, 3, 4]
    assert shifted(x, first, bounds).flatten().tolist() == [10, 1, 30, 3, 4]
    assert last(x, None, bounds).flatten().tolist() == [2, 0, 5, 0]
    assert last(x, first, bounds).flatten().tolist() == [2, 20, 5, 40]
    assert shifted(x, first[:1], None).flatten().tolist() == [10, 1, 2, 3, 4]
    assert last(x[:, :0], first[:1], None).flatten().tolist() == [10]
