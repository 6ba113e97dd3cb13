"""ssd takes the state dict of the authors' module, follows its equations, and knows the paper's patterns of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.kernels.ssd import ssd
from mambaverse.kernels.testing import assert_close, outputs_and_gradients
from mambaverse.mixers import create_mixer
from mambaverse.testing import Subject

DIM = 16


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"ngroups": 4}, {"in_proj.weight": (2 * 512 + 2 * 4 * 128 + 8, 256), "conv1d.weight": (1536, 1, 4),
                          "conv1d.bias": (1536,)}),
        ({"D_has_hdim": True}, {"D": (512,)}),
        ({"rmsnorm": False}, {"norm.weight": None}),
        ({"bias": True, "conv_bias": False}, {"in_proj.bias": (1288,), "out_proj.bias": (256,), "conv1d.bias": None}),
    ],
    ids=str,
)  # fmt: skip
def test_the_authors_state_dict_loads(arguments: dict[str, Any], expected: dict[str, tuple[int, ...] | None]) -> None:
    """Names and shapes of mamba_ssm's Mamba2(d_model=256, **arguments)."""
    shapes: dict[str, tuple[int, ...] | None] = {
        "in_proj.weight": (2 * 512 + 2 * 128 + 8, 256),
        "conv1d.weight": (768, 1, 4),
        "conv1d.bias": (768,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "norm.weight": (512,),
        "out_proj.weight": (256, 512),
    }
    theirs = {name: torch.randn(shape) for name, shape in (shapes | expected).items() if shape is not None}
    mixer = create_mixer("ssd", 256, **arguments)
    mixer.load_state_dict(theirs)  # strict
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, theirs[name])


@pytest.mark.parametrize(
    "options",
    [
        {"ngroups": 1},  # multi-input: B and C are shared by all heads
        {"ngroups": 2, "D_has_hdim": True, "bias": True},
        {"ngroups": 4, "norm_before_gate": True},  # multi-head: as many groups as heads
        {"ngroups": 2, "rmsnorm": False, "conv_bias": False},
    ],
    ids=str,
)
def test_ssd_is_the_recurrence_of_the_authors_module(options: dict[str, Any]) -> None:
    N, P, G = 5, 8, options["ngroups"]
    subject = Subject("ssd", DIM, {"d_state": N, "headdim": P, **options})
    mixer: Any = subject.build()
    u = subject.tokens(2, 13)
    y = mixer(x=u)
    m, u = mixer.double(), u.double()
    z, xBC, dt = m.in_proj(u).split([2 * DIM, 2 * DIM + 2 * G * N, 2 * DIM // P], -1)
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, (3, 0)), m.conv1d.weight, m.conv1d.bias, groups=xBC.shape[2]).mT)
    x, B, C = xBC.split([2 * DIM, G * N, G * N], -1)
    x, (B, C) = x.unflatten(-1, (-1, P)), (part.unflatten(-1, (G, N)) for part in (B, C))
    B, C = (part.repeat_interleave(x.shape[2] // G, dim=2) for part in (B, C))
    dt, A = F.softplus(dt + m.dt_bias), -m.A_log.exp()
    D = m.D.view(-1, P) if options.get("D_has_hdim") else m.D[:, None]
    h, outputs = x.new_zeros(2, *x.shape[2:], N), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D * x[:, t])
    expected = torch.stack(outputs, 1).flatten(2)

    def norm(v: Tensor) -> Tensor:
        groups = v.unflatten(-1, (G, -1))
        return (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * m.norm.weight

    if options.get("rmsnorm") is False:
        expected = expected * F.silu(z)
    elif options.get("norm_before_gate"):
        expected = norm(expected) * F.silu(z)
    else:
        expected = norm(expected * F.silu(z))
    assert_close("y", y, m.out_proj(expected), torch.float32)


@pytest.mark.parametrize(
    ("pattern", "x_heads", "B_heads", "C_heads"),
    [
        ("multi-head", 4, 4, 4),
        ("multi-input", 4, 1, 1),  # multi-value attention; Mamba's pattern
        ("multi-contract", 1, 1, 4),  # multi-query attention
        ("multi-expand", 1, 4, 1),  # multi-key attention
        ("grouped-input", 4, 2, 2),
    ],
)
def test_the_patterns_of_heads_are_groupings(pattern: str, x_heads: int, B_heads: int, C_heads: int) -> None:
    """Mamba-2, section 7.2: y[i] = Σ_{j <= i} (C[i]·B[j]) exp(Σ_{j < k <= i} Δ[k] A) Δ[j] x[j] in each of 4 heads.

    What heads share is given once and read four times, without a copy (a stride of 0); its gradient is their sum.
    """
    generator = torch.Generator().manual_seed(0)
    heads, length, N, P = 4, 70, 6, 5
    inputs = {
        "x": torch.randn(2, length, x_heads, P, generator=generator),
        "dt": torch.rand(2, length, heads, generator=generator),
        "A": -torch.rand(heads, generator=generator) - 0.1,
        "B": torch.randn(2, length, B_heads, N, generator=generator),
        "C": torch.randn(2, length, C_heads, N, generator=generator),
    }
    groups = max(B_heads, C_heads)

    def shared(part: Tensor, to: int) -> Tensor:
        return part if part.shape[2] == to else part.expand(-1, -1, to, -1)

    def by_operator(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd(shared(x, heads), dt, A, shared(B, groups), shared(C, groups))

    def by_formula(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x, B, C = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (x, B, C))
        total = (dt * A).cumsum(1)
        between = total[:, :, None] - total[:, None]  # (B, i, j, H)
        mask = torch.ones(length, length).tril().bool()[None, :, :, None]
        decay = torch.exp(between.masked_fill(~mask, float("-inf")))
        return torch.einsum("bihn,bjhn,bijh,bjh,bjhp->bihp", C, B, decay, dt, x)

    actual = outputs_and_gradients(by_operator, inputs)
    expected = outputs_and_gradients(by_formula, {name: value.double() for name, value in inputs.items()})
    for name, value in expected.items():
        assert_close(f"{pattern}: {name}", actual[name], value, torch.float32)
