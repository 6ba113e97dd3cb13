"""mamba3 against its recurrence, written out token by token in float64 from the equations, with all gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambaverse.errors import UserError
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer
from mambaverse.testing import Subject

DIM = 16
MIMO = {"is_mimo": True, "mimo_rank": 3}
OPTIONS: list[dict[str, Any]] = [
    {"d_state": 8, "headdim": 8},  # SISO as the authors' kernels: interleaved, half of the channels turn
    {"d_state": 8, "headdim": 4, "ngroups": 2, "rope_pairing": "half_split"},
    {
        "d_state": 7,
        "headdim": 8,
        "ngroups": 4,
        "rope_fraction": 1.0,
        "is_outproj_norm": True,
    },  # as many groups as heads
    {"d_state": 8, "headdim": 8, **MIMO},  # MIMO as the authors' kernels: half_split
    {"d_state": 8, "headdim": 4, "ngroups": 2, "rope_pairing": "interleaved", "is_outproj_norm": True, **MIMO},
    {"d_state": 6, "headdim": 8, "ngroups": 4, "rope_fraction": 1.0, "A_form": "softplus", **MIMO},
    {"d_state": 8, "headdim": 8, "is_mimo": True, "mimo_rank": 1},
]


def rotation(theta: Tensor, size: int, pairing: str) -> Tensor:
    """Return the matrices (B, H, N, N) that turn pairs of N channels by theta (B, H, S)."""
    matrix = torch.eye(size, dtype=theta.dtype).expand(*theta.shape[:2], -1, -1).clone()
    for i, angle in enumerate(theta.unbind(-1)):
        a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + size // 2)
        rows = [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)]
        matrix[:, :, [[a], [b]], [a, b]] = torch.stack(rows, -2)
    return matrix


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def recurrence(m: Any, options: dict[str, Any], u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return y and the final (θ, h, k, x) of the mixer's equations, one token after the other.

    u (B, L, D); θ (B, H, S), h (B, H, P, N), k (B, R, H, N), x (B, H, P).
    """
    N, P, G = options["d_state"], options["headdim"], options.get("ngroups", 1)
    R = options["mimo_rank"] if options.get("is_mimo") else 1
    E, H = 2 * DIM, 2 * DIM // P
    pairing = options.get("rope_pairing", "half_split" if options.get("is_mimo") else "interleaved")
    angles = int(N * options.get("rope_fraction", 0.5)) // 2
    ones = torch.ones(H, R, P, dtype=u.dtype)
    p, g, o = (ones if part is None else part for part in (m.mimo_x, m.mimo_z, m.mimo_o))
    theta, h, k_before, x_before = state
    outputs = []
    for u_t in u.unbind(1):
        parts = (u_t @ m.in_proj.weight.T).split([E, E, G * R * N, G * R * N, H, H, H, angles], -1)
        z, x = (part.reshape(-1, H, P) for part in parts[:2])
        B, C = (part.reshape(-1, R, G, N) for part in parts[2:4])
        dt = torch.log1p(torch.exp(parts[4] + m.dt_bias))
        f = torch.where(parts[5] >= 0, 1 + parts[5], 1 / (1 - parts[5]))
        if options.get("A_form") == "softplus":
            f = torch.log1p(torch.exp(parts[5]))
        A = -f.clamp(min=1e-4)
        trap = 1 / (1 + torch.exp(-parts[6]))  # λ
        theta = (theta + dt[..., None] * math.pi * torch.tanh(parts[7])[:, None]) % (2 * math.pi)
        turn = rotation(theta, N, pairing)
        group = [head // (H // G) for head in range(H)]
        k = rms(B, m.B_norm.weight)[:, :, group] + m.B_bias.transpose(0, 1)
        q = rms(C, m.C_norm.weight)[:, :, group] + m.C_bias.transpose(0, 1)
        k, q = (torch.einsum("bhnm,brhm->brhn", turn, part) for part in (k, q))
        v, v_before = (torch.einsum("bhp,hrp->brhp", part, p) for part in (x, x_before))
        alpha, beta, gamma = torch.exp(dt * A), (1 - trap) * dt * torch.exp(dt * A), trap * dt
        h = alpha[..., None, None] * h
        h = h + beta[..., None, None] * torch.einsum("brhp,brhn->bhpn", v_before, k_before)
        h = h + gamma[..., None, None] * torch.einsum("brhp,brhn->bhpn", v, k)
        y = torch.einsum("bhpn,brhn->brhp", h, q) + m.D[:, None] * v
        if options.get("is_outproj_norm"):
            y = rms(y, m.norm.weight.view(H, P))
        y = y * F.silu(torch.einsum("bhp,hrp->brhp", z, g))
        outputs.append(torch.einsum("brhp,hrp->bhp", y, o).flatten(1) @ m.out_proj.weight.T)
        k_before, x_before = k, x
    return torch.stack(outputs, 1), theta, h, k_before, x_before


def compare(options: dict[str, Any], length: int, dtype: torch.dtype, continued: bool) -> None:
    """Compare outputs, final states and the gradients of parameters, x and the state with those of the recurrence."""
    subject = Subject("mamba3", DIM, options)
    mixer, wide = subject.build().to(dtype), subject.build().double()
    u = subject.tokens(2, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = tuple(torch.rand(part.shape) * continued for part in mixer.init_state(2, dtype=torch.float32))
    results = []
    for module, to, run in (
        (mixer, dtype, lambda u, state: (lambda y, s: (y, *s))(*mixer(x=u, state=state, return_state=True))),
        (wide, torch.float64, lambda u, state: recurrence(wide, options, u, state)),
    ):
        leaves = {"u": u.detach().clone().to(to).requires_grad_()}
        leaves |= {
            f"{name}0": part.detach().clone().to(to).requires_grad_() for name, part in zip("θhkx", state, strict=True)
        }
        outs = run(leaves["u"], tuple(leaves[f"{name}0"] for name in "θhkx"))
        generator = torch.Generator().manual_seed(6)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outs]
        sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
        leaves |= dict(module.named_parameters())
        results.append(
            dict(zip(("y", "θ", "h", "k", "x"), (out.detach() for out in outs), strict=True))
            | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        )
    largest = max(value.square().mean().sqrt() for name, value in results[1].items() if name.startswith("gradient"))
    for name, expected in results[1].items():
        actual = results[0][name]
        if expected.square().mean().sqrt() < 1e-3 * largest:  # as of C_bias, where the norm of one token takes it out
            assert_close(name, actual + largest, expected + largest, dtype)
            continue
        if name == "θ":  # an angle just below 2π is one just above 0
            actual, expected = (torch.polar(torch.ones_like(angle), angle) for angle in (actual, expected))
        assert_close(name, actual, expected, dtype)


@pytest.mark.parametrize("continued", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_recurrence_of_its_equations(options: dict[str, Any], length: int, continued: bool) -> None:
    compare(options, length, torch.float32, continued)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_float64_it_is_the_recurrence_to_the_last_digits(options: dict[str, Any]) -> None:
    compare(options, 9, torch.float64, continued=True)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
def test_chunks_of_the_kernel_change_nothing(options: dict[str, Any]) -> None:
    """More places than one chunk of the kernel holds, and a chunk size that does not divide them."""
    for chunk_size in (None, 16):
        compare({**options, "chunk_size": chunk_size}, 211, torch.float32, continued=True)


def test_the_authors_state_dict_fits() -> None:
    """Names and shapes of mamba_ssm's Mamba3(d_model=256, ngroups=2, is_mimo=True, is_outproj_norm=True)."""
    mixer = create_mixer("mamba3", 256, ngroups=2, is_mimo=True, is_outproj_norm=True, device="meta")
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == {
        "in_proj.weight": (2 * 512 + 2 * 2 * 4 * 128 + 3 * 8 + 32, 256),
        "dt_bias": (8,),
        "B_bias": (8, 4, 128),
        "C_bias": (8, 4, 128),
        "B_norm.weight": (128,),
        "C_norm.weight": (128,),
        "mimo_x": (8, 4, 64),
        "mimo_z": (8, 4, 64),
        "mimo_o": (8, 4, 64),
        "D": (8,),
        "norm.weight": (512,),
        "out_proj.weight": (256, 512),
    }


def test_parameters_start_as_the_authors_code_says() -> None:
    mixer: Any = create_mixer("mamba3", 64, headdim=16, is_mimo=True, dt_min=0.01, dt_max=0.05)
    for name in ("B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D", "mimo_z"):
        assert (mixer.get_parameter(name) == 1).all(), name
    assert (mixer.mimo_x == 0.25).all() and (mixer.mimo_o == 0.25).all()
    dt = F.softplus(mixer.dt_bias)
    assert (dt >= 0.01 * 0.999).all() and (dt <= 0.05 * 1.001).all()
    assert mixer.no_weight_decay() == {"D", "dt_bias"}


def test_siso_is_mimo_of_rank_one() -> None:
    subject = Subject("mamba3", DIM, {"d_state": 8, "headdim": 8, "rope_pairing": "interleaved"})
    mixer, u = subject.build(), subject.tokens(1, 9)
    one = Subject("mamba3", DIM, {**subject.arguments, "is_mimo": True, "mimo_rank": 1}).build()
    one.load_state_dict(mixer.state_dict() | {f"mimo_{part}": torch.ones(4, 1, 8) for part in "xzo"})
    assert_close("y", one(x=u), mixer(x=u))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope_pairing": "halfsplit"}, "unknown rope_pairing 'halfsplit', did you mean 'half_split'?"),
        ({"A_form": "heavy"}, "unknown A_form 'heavy', did you mean 'heavy_tail'?"),
        ({"rope_fraction": 0.0}, "turn a pair of channels: 2 / d_state = 0.015625 or more; got 0"),
        ({"rope_fraction": 1.5}, "or more; got 1.5"),
        ({"d_state": 7, "rope_pairing": "half_split"}, "so d_state must be even, got 7"),
        ({"headdim": 7}, "headdim must divide expand · dim = 32, got 7"),
        ({"headdim": 16, "ngroups": 3}, "ngroups must divide the number of heads 2"),
        ({"mimo_rank": 0}, "mimo_rank must be at least 1, got 0"),
        ({"A_floor": 0.0}, "A_floor must be a finite number above 0, got 0"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        create_mixer("mamba3", DIM, **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 13], "mamba3: cu_seqlens goes from 0 to 13; expected from 0 to the length 12"),
        ([0, 5, 3, 12], "mamba3: cu_seqlens falls from 5 to 3 at index 2"),
        ([0.0, 12.0], r"Mamba3: expected cu_seqlens \(S \+ 1,\) int32 or int64 of .*, got \(2,\) float32"),
    ],
)
def test_boundaries_that_do_not_fit_are_named_in_tokens_not_in_places(bounds: list[Any], message: str) -> None:
    mixer = create_mixer("mamba3", DIM, d_state=8, **MIMO)
    with pytest.raises(ValueError, match=message):
        mixer(x=torch.zeros(1, 12, DIM), cu_seqlens=torch.tensor(bounds))


def test_a_state_of_another_batch_is_refused() -> None:
    mixer = create_mixer("mamba3", DIM, d_state=8, headdim=8)
    with pytest.raises(ValueError, match=r"expected a state .* of shapes \[\(1, 4, 2\), .* got \[\(2, 4, 2\), "):
        mixer(x=torch.zeros(1, 12, DIM), state=mixer.init_state(2))


def test_no_tokens_leave_the_state_as_it_was() -> None:
    mixer = create_mixer("mamba3", DIM, d_state=8, **MIMO)
    _, state = mixer(x=torch.randn(1, 5, DIM), return_state=True)
    nothing, bounds = torch.zeros(1, 0, DIM), torch.zeros(2, dtype=torch.int32)
    for packing in (None, bounds):
        y, after = mixer(x=nothing, state=state, cu_seqlens=packing, return_state=True)
        assert y.shape == nothing.shape
        for part, kept in zip(after, state, strict=True):
            assert torch.equal(part, kept)


def test_a_state_holds_nothing_but_itself() -> None:
    _, state = create_mixer("mamba3", 64)(x=torch.randn(1, 200, 64), return_state=True)
    assert [part.untyped_storage().nbytes() for part in state] == [part.nbytes for part in state]
