"""bissd is two scans of Mamba-2 between shared projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer
from mambaverse.testing import Subject

DIM, N, P, G = 16, 5, 8, 2
BASE: dict[str, Any] = {"d_state": N, "headdim": P, "ngroups": G}


def one_direction(u: Tensor, dt: Tensor, conv: Any, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """Return y (B, L, E) of [x, B, C] (B, L, E + 2 G N) and δ (B, L, H), token by token."""
    u = F.silu(F.conv1d(F.pad(u.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=u.shape[2])).mT
    x, B, C = u.split([2 * DIM, G * N, G * N], -1)
    x, (B, C) = x.unflatten(-1, (-1, P)), (m.unflatten(-1, (G, N)) for m in (B, C))
    B, C = (m.repeat_interleave(x.shape[2] // G, dim=2) for m in (B, C))
    dt, A = F.softplus(dt + dt_bias), -A_log.exp()
    h, outputs = x.new_zeros(x.shape[0], *x.shape[2:], N), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1).flatten(2)


@pytest.mark.parametrize("merge", ["mean", "add"])
@pytest.mark.parametrize("shared", [False, True])
def test_bissd_is_two_scans_between_shared_projections(shared: bool, merge: str) -> None:
    subject = Subject("bissd", DIM, {**BASE, "shared": shared, "merge": merge})
    mixer: Any = subject.build()
    x = subject.tokens(2, 11)
    y = mixer(x=x)
    m, x = mixer.double(), x.double()
    z, u, dt = m.in_proj(x).split([2 * DIM, 2 * DIM + 2 * G * N, 2 * DIM // P], -1)
    forward = one_direction(u, dt, m.conv1d, m.dt_bias, m.A_log, m.D)
    if shared:
        u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), m.conv1d.weight, m.conv1d.bias, groups=u.shape[2])).mT
        backward = scan_of_convolved(u.flip(1), dt.flip(1), m).flip(1)
    else:
        backward = one_direction(u.flip(1), dt.flip(1), m.conv1d_b, m.dt_bias_b, m.A_b_log, m.D_b).flip(1)
    merged = (forward + backward) / (2 if merge == "mean" else 1) * F.silu(z)
    groups = merged.unflatten(-1, (G, -1))
    normed = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * m.norm.weight
    assert_close("y", y, m.out_proj(normed), torch.float32)


def scan_of_convolved(u: Tensor, dt: Tensor, m: Any) -> Tensor:
    """Return the backward direction of a shared mixer, which reads what the forward convolution wrote."""
    x, B, C = u.split([2 * DIM, G * N, G * N], -1)
    heads, length = 2 * DIM // P, u.shape[1]
    B, C = (part.unflatten(-1, (G, N)).repeat_interleave(heads // G, dim=2) for part in (B, C))
    step = F.softplus(dt + m.dt_bias)
    total = (step * -m.A_b_log.exp()).cumsum(1)  # the quadratic form: y = (mask · decay · C Bᵀ) Δ x
    decay = torch.exp(
        (total[:, :, None] - total[:, None]).masked_fill(
            torch.ones(length, length).triu(1).bool()[None, :, :, None], float("-inf")
        )
    )
    scores = torch.einsum("bihn,bjhn->bijh", C, B) * decay
    x = x.unflatten(-1, (-1, P))
    return (torch.einsum("bijh,bjhp->bihp", scores, step[..., None] * x) + m.D[:, None] * x).flatten(2)


def test_both_directions_alike_are_ssd_read_twice() -> None:
    """With equal parameters in both directions, and no norm, y = ssd(u) + R ssd(R u): the gate and W_out are linear."""
    arguments = {**BASE, "rmsnorm": False}
    ssd, x = Subject("ssd", DIM, arguments).build(), Subject("ssd", DIM).tokens(2, 11)
    both: Any = Subject("bissd", DIM, {**arguments, "merge": "add"}).build()
    state = ssd.state_dict()
    names = {"A_b_log": "A_log", "dt_bias_b": "dt_bias", "D_b": "D"}
    names |= {f"conv1d_b.{part}": f"conv1d.{part}" for part in ("weight", "bias")}
    both.load_state_dict(state | {own: state[name] for own, name in names.items()})
    assert_close("y", both(x=x), ssd(x=x) + ssd(x=x.flip(1)).flip(1))


def test_parameters_start_as_those_of_ssd() -> None:
    mixer: Any = create_mixer("bissd", 256, A_init_range=(2, 3))
    for A_log, dt_bias, D in ((mixer.A_log, mixer.dt_bias, mixer.D), (mixer.A_b_log, mixer.dt_bias_b, mixer.D_b)):
        assert (A_log.exp() >= 2 * 0.999).all() and (A_log.exp() <= 3 * 1.001).all() and (D == 1).all()
        dt = F.softplus(dt_bias)
        assert (dt >= 0.001 * 0.999).all() and (dt <= 0.1 * 1.001).all()
    assert mixer.no_weight_decay() == {"A_log", "A_b_log", "D", "D_b", "dt_bias", "dt_bias_b"}
    shared = create_mixer("bissd", 16, shared=True)
    assert shared.no_weight_decay() == {"A_log", "A_b_log", "D", "dt_bias"}
    assert not any(name.startswith(("conv1d_b", "dt_bias_b", "D_b")) for name in shared.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge": "men"}, "unknown merge 'men', did you mean 'mean'?"),
        ({"headdim": 7}, "headdim must divide expand · dim = 32, got 7"),
        ({"headdim": 16, "ngroups": 3}, "ngroups must divide the number of heads 2"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit must be two numbers"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        create_mixer("bissd", DIM, **arguments)
    assert message in str(error.value)
