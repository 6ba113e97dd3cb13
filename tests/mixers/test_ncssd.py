"""ncssd is attention without softmax between the projections of Mamba-2, after a convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mambaverse.errors import UserError
from mambaverse.kernels import backend
from mambaverse.kernels.testing import assert_close
from mambaverse.mixers import create_mixer, ncssd
from mambaverse.testing import Subject

DIM, N, P, G = 16, 5, 8, 2
BASE: dict[str, Any] = {"d_state": N, "headdim": P, "ngroups": G}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("conv", ["sequence", "grid"])
def test_every_token_reads_what_all_of_them_write(conv: str, before: bool) -> None:
    subject = Subject("ncssd", DIM, {**BASE, "conv": conv, "norm_before_gate": before})
    m: Any = subject.build()
    x = subject.tokens(2, 12)
    y = m(x=x, spatial_shape=(3, 4))
    m, x = m.double(), x.double()
    z, u, dt = m.in_proj(x).split([2 * DIM, 2 * DIM + 2 * G * N, 2 * DIM // P], -1)
    if conv == "grid":
        u = F.silu(m.conv2d(u.mT.unflatten(2, (3, 4)))).flatten(2).mT
    else:
        u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), m.conv1d.weight, m.conv1d.bias, groups=u.shape[2])).mT
    v, B, C = u.split([2 * DIM, G * N, G * N], -1)
    v, (B, C) = v.unflatten(-1, (-1, P)), (c.unflatten(-1, (G, N)).repeat_interleave(4 // G, dim=2) for c in (B, C))
    weight = F.softplus(dt + m.dt_bias) * m.A_log.exp()
    read = torch.einsum("bihn,bjhn,bjh,bjhp->bihp", C, B, weight, v) + m.D[:, None] * v
    gated = read.flatten(2) if before else read.flatten(2) * F.silu(z)
    groups = gated.unflatten(-1, (G, -1))
    normed = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * m.norm.weight
    assert_close("y", y, m.out_proj(normed * F.silu(z) if before else normed), torch.float32)


@pytest.mark.parametrize("conv", ["sequence", "grid"])
def test_what_is_worked_out_again_is_the_same(conv: str) -> None:
    subject = Subject("ncssd", DIM, {**BASE, "conv": conv})
    x, results = subject.tokens(2, 12).requires_grad_(), []
    for recompute in (False, True):
        mixer: Any = subject.build()
        mixer.recompute = recompute
        kept: list[int] = []

        def keep(t: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = mixer(x=x, spatial_shape=(3, 4))
        results.append((sum(kept), y.detach(), *torch.autograd.grad(y.sum(), [x, *mixer.parameters()])))
    (all_kept, *plain), (few_kept, *again) = results
    assert few_kept < all_kept / 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_is_worked_out_again_is_of_the_same_parameters_and_backend(loads: list[tuple[str, str]]) -> None:
    subject = Subject("ncssd", DIM, {**BASE, "recompute": True})
    mixer: Any = subject.build()
    x = subject.tokens(2, 12)
    with backend.use_backend("reference"):
        y = mixer(x=x)
    y.sum().backward()
    assert loads.count(("nc_ssd", "reference")) == 3 and {name for _, name in loads} == {"reference"}
    y = mixer(x=x)
    with torch.no_grad():
        mixer.out_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameters were changed or replaced between forward and backward"):
        y.sum().backward()
    y = torch.func.functional_call(mixer, {name: 2 * p for name, p in mixer.named_parameters()}, (), {"x": x})
    with pytest.raises(RuntimeError, match="parameters were changed or replaced"):
        y.sum().backward()


def test_nothing_is_worked_out_again_where_no_gradient_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("ncssd", DIM, {**BASE, "recompute": True})
    mixer, x = subject.build(), subject.tokens(2, 12)
    program = torch.export.export(mixer, (), {"x": x}, strict=True)
    assert_close("y", program.module()(x=x), mixer(x=x).double())
    monkeypatch.setattr(ncssd, "recomputed", None)
    with torch.no_grad():
        mixer(x=x)


def test_a_hook_of_the_grids_convolution_is_called() -> None:
    subject = Subject("ncssd", DIM, {**BASE, "conv": "grid"})
    mixer: Any = subject.build()
    seen: list[torch.Size] = []
    mixer.conv2d.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    mixer(x=subject.tokens(2, 12), spatial_shape=(3, 4))
    assert seen == [(2, 2 * DIM + 2 * G * N, 3, 4)]


def test_the_parameters_of_ssd_load() -> None:
    ssd, mixer = create_mixer("ssd", DIM, **BASE), create_mixer("ncssd", DIM, **BASE)
    mixer.load_state_dict(ssd.state_dict())
    assert mixer.no_weight_decay() == ssd.no_weight_decay()


def test_without_a_window_the_order_of_tokens_does_not_matter() -> None:
    subject = Subject("ncssd", DIM, {**BASE, "d_conv": 1})
    mixer, x, order = subject.build(), subject.tokens(2, 9), torch.tensor([3, 0, 8, 1, 2, 7, 6, 4, 5])
    assert_close("y", mixer(x=x[:, order]), mixer(x=x)[:, order].double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv": "gird"}, "ncssd: unknown conv 'gird', did you mean 'grid'?"),
        ({"conv": "grid", "d_conv": 4}, "ncssd: on a grid d_conv must be odd, so that it has a middle, got 4"),
        ({"headdim": 7}, "headdim must divide expand · dim = 32, got 7"),
        ({"headdim": 16, "ngroups": 3}, "ngroups must divide the number of heads 2"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        create_mixer("ncssd", DIM, **arguments)
    assert message in str(error.value)
