"""Mixers equal the modules that they are named after, and the papers' equations written out in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer
from mambaverse.mixers._ops import rotary, turns
from mambaverse.testing import Subject

DIM = 16


def perturbed(name: str, **arguments: Any) -> Any:
    """A mixer whose parameters have all left their initial values, and tokens (2, 11, DIM)."""
    return Subject(name, DIM, arguments).build(), Subject(name, DIM).tokens(2, 11)


@pytest.mark.parametrize("bias", [False, True])
def test_s6_takes_the_state_dict_of_the_mamba_mixer_of_transformers_and_gives_its_outputs(bias: bool) -> None:
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=DIM, state_size=4, num_hidden_layers=1, use_bias=bias)
    theirs = mamba.MambaMixer(config, layer_idx=0).eval()
    ours, x = perturbed("s6", d_state=4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_close("y", ours(x=x), theirs(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_takes_the_state_dict_of_the_mamba2_mixer_of_transformers_and_gives_its_outputs(groups: int) -> None:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = mamba2.Mamba2Config(
        hidden_size=DIM, state_size=4, num_heads=4, head_dim=8, n_groups=groups, chunk_size=4, num_hidden_layers=1
    )
    theirs = mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    ours, x = perturbed("ssd", d_state=4, headdim=8, ngroups=groups)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_close("y", ours(x=x), theirs(x))


def s6_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C·h of h[t] = exp(Δ A) h[t-1] + Δ B u, for B and C (B, L, E, N)."""
    h, y = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * B[:, t]
        y.append((C[:, t] * h).sum(-1))
    out = torch.stack(y, 1)
    return 2 * out.real if out.is_complex() else out


def convolve(u: Tensor, conv: nn.Conv1d, reverse: bool = False) -> Tensor:
    u = u.flip(1) if reverse else u
    y = F.silu(F.conv1d(F.pad(u.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=u.shape[2])).mT
    return y.flip(1) if reverse else y


def one_direction(mixer: Any, u: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Tensor:
    delta, B, C = x_proj(u).split(mixer.sizes, dim=-1)
    y = s6_scan(u, F.softplus(dt_proj(delta)), -A_log.exp(), B[:, :, None], C[:, :, None])
    return y + D * u


@pytest.mark.parametrize("merge", ["mean", "add"])
def test_vim_is_two_scans_between_shared_projections(merge: str) -> None:
    mixer, x = perturbed("vim", d_state=4, merge=merge)
    u, z = mixer.in_proj(x).chunk(2, -1)
    forward = one_direction(mixer, convolve(u, mixer.conv1d), mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    u_b = convolve(u, mixer.conv1d_b, reverse=True).flip(1)
    backward = one_direction(mixer, u_b, mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b).flip(1)
    y = (forward + backward) * F.silu(z) / (2 if merge == "mean" else 1)
    assert_close("y", mixer(x=x), mixer.out_proj(y))


def test_shared_vim_scans_one_convolution_both_ways() -> None:
    mixer, x = perturbed("vim", d_state=4, merge="add", shared=True)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = convolve(u, mixer.conv1d)
    forward = one_direction(mixer, u, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    backward = one_direction(mixer, u.flip(1), mixer.x_proj, mixer.dt_proj, mixer.A_b_log, mixer.D).flip(1)
    assert_close("y", mixer(x=x), mixer.out_proj((forward + backward) * F.silu(z)))
    assert not any(name.startswith(("conv1d_b", "x_proj_b", "dt_proj_b", "D_b")) for name in mixer.state_dict())


def test_tied_vim_is_two_s6_mixers_that_share_their_projections() -> None:
    vim, x = perturbed("vim", d_state=4, merge="add")
    state = vim.state_dict()
    own = {name: name.replace("A_log", "A_b_log") if name == "A_log" else _backward_name(name) for name in state}
    fwd, bwd = create_mixer("s6", DIM, d_state=4), create_mixer("s6", DIM, d_state=4)
    fwd.load_state_dict({name: state[name] for name in fwd.state_dict()})
    bwd.load_state_dict({name: state[own[name]] for name in bwd.state_dict()})
    assert_close("y", vim(x=x), fwd(x=x) + bwd(x=x.flip(1)).flip(1))


def _backward_name(name: str) -> str:
    part, dot, rest = name.partition(".")
    return name if part in ("in_proj", "out_proj") else f"{part}_b{dot}{rest}"


@pytest.mark.parametrize("A_init", ["s4d_real", "s4d_lin"])
@pytest.mark.parametrize("selective", ["", "dt", "B", "C", "BC", "dtB", "dtBC"])
def test_s6_follows_the_equations_whatever_is_selective(selective: str, A_init: str) -> None:
    flags = {f"selective_{part}": part in selective for part in ("dt", "B", "C")}
    mixer, x = perturbed("s6", d_state=4, A_init=A_init, **flags)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = convolve(u, mixer.conv1d)
    parts = mixer.x_proj(u).split(mixer.sizes, -1) if selective else (u, u, u)
    dt = mixer.dt_proj(parts[0]) if "dt" in selective else mixer.dt_bias.expand_as(u)
    B, C = (
        part[:, :, None] if name in selective else constant.expand(*x.shape[:2], -1, -1)
        for name, part, constant in (("B", parts[1], mixer.B), ("C", parts[2], mixer.C))
    )
    A = -mixer.A_log.exp()
    if A_init == "s4d_lin":
        A = torch.complex(A, mixer.A_imag)
        B, C = (torch.complex(*M.chunk(2, -1)) for M in (B, C))
    y = s6_scan(u, F.softplus(dt), A, B, C) + mixer.D * u
    assert_close("y", mixer(x=x), mixer.out_proj(y * F.silu(z)))


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["legs", "real"])
def test_s4d_is_a_recurrence_before_gelu_and_glu(init: str, discretization: str) -> None:
    mixer, x = perturbed("s4d", d_state=4, init=init, discretization=discretization)
    A, C, dt = -mixer.A_log.exp(), mixer.C, mixer.log_dt.exp()[:, None]
    if init == "legs":
        A, C = torch.complex(A, mixer.A_imag), 2 * torch.complex(C[:, :2], C[:, 2:])
    a, b = {
        "zoh": lambda: (torch.exp(dt * A), (torch.exp(dt * A) - 1) / A),
        "bilinear": lambda: ((1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)),
    }[discretization]()
    h, outputs = torch.zeros(2, *A.shape, dtype=A.dtype), []
    for x_t in x.unbind(1):
        h = a * h + b * x_t[..., None]
        outputs.append((C * h).sum(-1).real + mixer.D * x_t)
    y, gate = mixer.out_proj(F.gelu(torch.stack(outputs, 1))).chunk(2, -1)
    assert_close("y", mixer(x=x), y * torch.sigmoid(gate))


def test_attention_is_that_of_torch() -> None:
    mixer, x = perturbed("attention", num_heads=4)
    theirs = nn.MultiheadAttention(DIM, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": mixer.qkv.weight,
            "in_proj_bias": mixer.qkv.bias,
            "out_proj.weight": mixer.out_proj.weight,
            "out_proj.bias": mixer.out_proj.bias,
        }
    )
    assert_close("y", mixer(x=x), theirs(x, x, x)[0])


def test_rotary_scores_depend_on_distance_alone() -> None:
    x, at = Subject("attention", 8).tokens(1, 5)[:, :, None].double(), torch.arange(5)[None]
    turned = [rotary(x, *turns(at + shift, 8, 100.0, x)) for shift in (0, 10**9)]
    scores = [torch.einsum("blhp,bmhp->blm", y, y) for y in turned]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(scores[0], torch.einsum("blhp,bmhp->blm", x, x))


@pytest.mark.parametrize("merge", ["add", "mean", "ew_multiply", "concat"])
def test_bidirectional_merges_a_forward_and_a_reversed_run(merge: str) -> None:
    mixer, x = perturbed("bidirectional", mixer="s6", mixer_args={"d_state": 4}, merge=merge)
    f, b = mixer.fwd(x=x), mixer.bwd(x=x.flip(1)).flip(1)
    expected = {
        "add": lambda: f + b,
        "mean": lambda: (f + b) / 2,
        "ew_multiply": lambda: f * b,
        "concat": lambda: mixer.merge_proj(torch.cat([f, b], -1)),
    }[merge]()
    assert_close("y", mixer(x=x), expected)
